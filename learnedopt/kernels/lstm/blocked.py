""":class:`~learnedopt.rules.LSTMRule` in place on blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.blocked_lstm import Layers, with_bias
from learnedopt.kernels.core.blocked_maths import log_sign
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import LSTMRule


class Program(blocked.Program):
    """The read-out has the top layer."""

    def __init__(self, rule: LSTMRule) -> None:
        features = 2 if rule.config.preprocessing == "log_sign" else 1
        hidden, layers = rule.config.hidden_size, rule.config.num_layers
        super().__init__(rule, Sizes(features, outputs=1, hidden=hidden, layers=layers))
        self._config = rule.config
        self._lstm = Layers(rule.lstm)
        self._readout = rule.config.output_scale * with_bias(rule.readout)

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v = block.views
        if self._config.preprocessing == "log_sign":
            log_sign(v.grad, self._config.preprocessing_p, v.features)
        else:
            v.features.copy_(v.grad)
        self._lstm.run(block)
        return torch.mm(self._readout, v.top, out=v.out)
