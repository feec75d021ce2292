""":class:`~learnedopt.rules.MetaLSTMRule` in place on blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.blocked_lstm import Layers
from learnedopt.kernels.core.blocked_maths import log_sign
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import MetaLSTMRule


class Program(blocked.Program):
    """``top`` has the parameters and both feedbacks besides the layer."""

    def __init__(self, rule: MetaLSTMRule) -> None:
        super().__init__(rule, Sizes(4, outputs=2, extra=3, hidden=rule.config.hidden_size))
        self._config = rule.config
        self._lstm = Layers(rule.lstm)
        none = rule.forget_gate.weight.new_zeros(1, 1)
        forget, input_ = rule.forget_gate, rule.input_gate
        self._gates = torch.cat(
            [
                torch.cat([forget.weight, none, forget.bias.unsqueeze(1)], dim=1),
                torch.cat([input_.weight[:, :-1], none, input_.weight[:, -1:], input_.bias.unsqueeze(1)], dim=1),
            ]
        )

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        grad = v.grad.div_(config.gradient_divisor)
        log_sign(grad, config.preprocessing_p, v.features[:2])
        v.features[2:].copy_(block.of_tensors(statistics, v.features[2:]))
        self._lstm.run(block)
        param, *feedback = v.top[-4:-1].split(1)
        param.copy_(v.param)
        for name, row in zip(("forget", "input"), feedback):
            block.read(name, 0, row)
        gates = torch.mm(self._gates, v.top, out=v.out)
        values = torch.sigmoid(gates, out=v.top[-3:-1])
        for name, row in zip(("forget", "input"), (values if config.gate_feedback == "gate" else gates).split(1)):
            block.write(name, 0, row)
        forget, input_ = values.split(1)
        return forget.sub_(1.0).mul_(param).addcmul_(input_, grad, value=-1.0)
