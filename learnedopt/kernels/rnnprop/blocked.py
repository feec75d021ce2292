""":class:`~learnedopt.rules.RNNpropRule` in place on blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.blocked_lstm import Layers, with_bias
from learnedopt.kernels.core.blocked_maths import adam_directions
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import RNNpropRule
from learnedopt.rules.rnnprop import Row


class Program(blocked.Program):
    """``scalars`` has the moments, their corrections, what goes into the first layer, and the running RMS."""

    def __init__(self, rule: RNNpropRule) -> None:
        hidden, layers = rule.config.hidden_size, rule.config.num_layers
        super().__init__(rule, Sizes(hidden, outputs=1, scalars=8, hidden=hidden, layers=layers))
        self._config = rule.config
        self._lstm = Layers(rule.lstm)
        self._inputs, self._readout = with_bias(rule.inputs), with_bias(rule.readout)

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        rooms = zip(("momentum", "square"), v.scalars[:2].split(1))
        momentum, square = (block.open(name, 0, room) for name, room in rooms)
        corrections = block.of_tensors(statistics, v.scalars[2 : 2 + len(Row)])
        directions, rms = v.scalars[4:7], v.scalars[7:]
        adam_directions(v.grad, corrections, (momentum, square), config, directions[:2], rms)
        block.write("momentum", 0, momentum)
        block.write("square", 0, square)
        directions[2].fill_(1.0)
        F.elu_(torch.mm(self._inputs, directions, out=v.features))
        self._lstm.run(block)
        return torch.mm(self._readout, v.top, out=v.out).tanh_().mul_(-config.output_scale)
