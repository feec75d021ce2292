"""The coordinate-wise LSTM optimizer of Andrychowicz et al. 2016."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from learnedopt.rules.base import RuleConfig, State, StateSpec, UpdateRule
from learnedopt.rules.preprocessing import log_sign
from learnedopt.rules.recurrent import CoordinatewiseLSTM


@dataclass(frozen=True)
class LSTMConfig(RuleConfig):
    """Settings of :class:`LSTMRule`; the defaults are the paper's for neural networks."""

    kind: ClassVar[str] = "lstm"
    hidden_size: int = 20
    num_layers: int = 2
    preprocessing: Literal["log_sign", "identity"] = "log_sign"
    """How the gradient enters: two channels (:func:`~learnedopt.rules.preprocessing.log_sign`), or as it is."""
    preprocessing_p: float = 10.0
    output_scale: float = 0.1
    """The network's output is multiplied by this; the paper uses 0.1 on networks and 1 on quadratics."""


class LSTMRule(UpdateRule):
    r"""Each coordinate's gradient goes through an LSTM with shared weights; a linear read-out is its update.

    .. math::
        h_t, s_t = \mathrm{LSTM}(\mathrm{pre}(\nabla_t), h_{t-1}, s_{t-1}), \qquad
        \theta_{t+1} = \theta_t + \eta\, (w^\top h_t + b)

    with :math:`\eta` = ``output_scale``. Before training the read-out is zero and nothing moves. The read-out has a
    bias, as in the authors' code, so this rule moves coordinates whose gradient is zero.

    Shapes: state ``h`` and ``c`` are ``(num_layers, hidden_size, N)``: 320 bytes per parameter at the defaults.

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NeurIPS 2016
    (arXiv:1606.04474), section 2.1 and appendix A.

    >>> from learnedopt.rules import LSTMConfig, Segments
    >>> rule = LSTMRule(LSTMConfig())
    >>> segments = Segments([3])
    >>> delta, state = rule.update(torch.zeros(3), torch.ones(3), rule.init_state(segments), segments)
    >>> delta.shape, state["h"].shape
    (torch.Size([3]), torch.Size([2, 20, 3]))
    """

    config_class = LSTMConfig
    config: LSTMConfig
    reads_param = False

    def __init__(self, config: LSTMConfig | None = None) -> None:
        super().__init__(config or LSTMConfig())
        if self.config.preprocessing not in ("log_sign", "identity"):
            raise ValueError(f"preprocessing must be 'log_sign' or 'identity', got {self.config.preprocessing!r}")
        if not 0.0 < self.config.preprocessing_p < math.inf:
            raise ValueError(f"preprocessing_p must be positive and finite, got {self.config.preprocessing_p}")
        if not math.isfinite(self.config.output_scale):
            raise ValueError(f"output_scale must be finite, got {self.config.output_scale}")
        channels = 2 if self.config.preprocessing == "log_sign" else 1
        self.lstm = CoordinatewiseLSTM(channels, self.config.hidden_size, self.config.num_layers)
        self.readout = nn.Linear(self.config.hidden_size, 1)
        # From zero, meta-training first learns which way is down. A random read-out would start by walking every
        # coordinate off in one random direction, into saturated networks that have no gradient left to learn from.
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def state_spec(self) -> dict[str, StateSpec]:
        return self.lstm.state_spec()

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        if self.config.preprocessing == "log_sign":
            x = log_sign(grad, self.config.preprocessing_p)
        else:
            x = grad.unsqueeze(0)
        top, h, c = self.lstm(x, state["h"], state["c"])
        delta = torch.addmm(self.readout.bias.unsqueeze(1), self.readout.weight, top).squeeze(0)
        return self.config.output_scale * delta, {"h": h, "c": c}
