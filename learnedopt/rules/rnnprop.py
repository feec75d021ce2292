"""RNNprop: the LSTM optimizer of Lv et al. 2017, which sees gradients over their running size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule
from learnedopt.rules.moments import adam_directions, bias_correction, momentum_spec
from learnedopt.rules.recurrent import CoordinatewiseLSTM


class Row(IntEnum):
    """Of the statistics: bias corrections."""

    MOMENTUM_CORRECTION = 0
    SQUARE_CORRECTION = 1


@dataclass(frozen=True)
class RNNpropConfig(RuleConfig):
    """Settings of :class:`RNNpropRule`; the defaults are the paper's."""

    kind: ClassVar[str] = "rnnprop"
    hidden_size: int = 20
    """Units of each LSTM layer, and of the layer before them."""
    num_layers: int = 2
    momentum_decay: float = 0.95
    square_decay: float = 0.95
    """Decays of the two moments, :math:`\\beta_1` and :math:`\\beta_2`."""
    eps: float = 1e-8
    output_scale: float = 0.1
    """:math:`\\alpha`: no update is larger."""


class RNNpropRule(UpdateRule):
    r"""RMSprop's and Adam's directions go through an LSTM with shared weights, whose bounded read-out is the update.

    With :math:`\hat m` and :math:`\hat v` the bias-corrected moments of the gradient,

    .. math::
        x_t &= \mathrm{ELU}\!\left(A\, \Big(\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon},
            \frac{g_t}{\sqrt{\hat v_t} + \epsilon}\Big) + a\right) \\
        h_t, s_t &= \mathrm{LSTM}(x_t, h_{t-1}, s_{t-1}), \qquad
        \theta_{t+1} = \theta_t - \alpha \tanh(w^\top h_t + b)

    Multiplying the loss by a constant changes nothing (up to :math:`\epsilon`), and :math:`|\Delta\theta| \le \alpha`.
    Before training the read-out is zero and nothing moves. It has a bias, as in the authors' code, so this rule moves
    coordinates whose gradient is zero.

    Shapes: state ``h`` and ``c`` are ``(num_layers, hidden_size, N)``, ``momentum`` and ``square`` ``(N,)``, ``step``
    ``(S,)``: 328 bytes per parameter at the defaults.

    Source: Lv, Jiang & Li, "Learning gradient descent: better generalization and longer horizons", ICML 2017
    (arXiv:1703.03633), section 4.

    >>> from learnedopt.rules import RNNpropConfig, Segments
    >>> rule, segments = RNNpropRule(RNNpropConfig(output_scale=0.01)), Segments([3])
    >>> delta, state = rule.update(torch.zeros(3), torch.ones(3), rule.init_state(segments), segments)
    >>> delta.shape, rule.update_bound()
    (torch.Size([3]), 0.01)
    """

    config_class = RNNpropConfig
    config: RNNpropConfig
    reads_param = False

    def __init__(self, config: RNNpropConfig | None = None) -> None:
        super().__init__(config or RNNpropConfig())
        config = self.config
        for name in ("momentum_decay", "square_decay"):
            if not 0.0 <= getattr(config, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
        if not 1e-18 <= config.eps < math.inf:
            raise ValueError(f"eps must be finite and at least 1e-18, got {config.eps}")
        if not 0.0 < config.output_scale < math.inf:
            raise ValueError(f"output_scale must be positive and finite, got {config.output_scale}")
        self.lstm = CoordinatewiseLSTM(config.hidden_size, config.hidden_size, config.num_layers)
        self.inputs = nn.Linear(2, config.hidden_size)
        self.readout = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            **self.lstm.state_spec(),
            "momentum": momentum_spec(self.config.momentum_decay, self.config.square_decay),
            "square": StateSpec(turns_as="square"),
            "step": StateSpec(scope="tensor"),
        }

    def update_bound(self) -> float:
        """The largest change of any coordinate in one step at ``lr=1``, for any weights and any gradients."""
        return self.config.output_scale

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        step = state["step"] + 1.0
        decays = self.config.momentum_decay, self.config.square_decay
        return torch.stack([bias_correction(decay, step) for decay in decays]), {"step": step}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        config = self.config
        moments, directions = adam_directions(grad, state, statistics, config)
        x = F.elu(torch.addmm(self.inputs.bias.unsqueeze(1), self.inputs.weight, torch.stack(directions)))
        top, h, c = self.lstm(x, state["h"], state["c"])
        out = torch.addmm(self.readout.bias.unsqueeze(1), self.readout.weight, top).squeeze(0)
        delta = -config.output_scale * torch.tanh(out)
        return delta, {"h": h, "c": c, **moments}
