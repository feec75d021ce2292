"""An LSTM that modulates Adam's directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor, nn

from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule
from learnedopt.rules.moments import momentum_bound, momentum_spec
from learnedopt.rules.recurrent import CoordinatewiseLSTM

_COORDINATE_FEATURES = 5


class Row(IntEnum):
    """Of the statistics: bias corrections, then the features that every coordinate of a tensor shares."""

    FAST_CORRECTION = 0
    SLOW_CORRECTION = 1
    SQUARE_CORRECTION = 2
    LOG_PARAM = 3
    ALIGNMENT = 4
    CONSISTENCY = 5
    TIME = 6
    FEATURES = LOG_PARAM  # where they begin


class Mean(IntEnum):
    """Of what the rule takes the means of."""

    PARAM_SQUARE = 0
    FAST_GRAD = 1
    SLOW_SQUARE = 2


@dataclass(frozen=True)
class AdamLSTMConfig(RuleConfig):
    """Settings of :class:`AdamLSTMRule`."""

    kind: ClassVar[str] = "adam_lstm"
    hidden_size: int = 20
    num_layers: int = 2
    fast_decay: float = 0.9
    slow_decay: float = 0.99
    """Decays of the two momenta, :math:`\\beta_1` and :math:`\\beta_2`."""
    square_decay: float = 0.99
    """Decay of the second moment, :math:`\\beta_v`."""
    eps: float = 1e-12
    nominal_step: float = 3e-3
    """Step size before training, when the read-out is zero."""
    log_step_gain: float = 3.0
    log_step_bound: float = 5.0
    """The learned step size stays within a factor ``exp(log_step_bound)`` of ``nominal_step``."""
    mix_bound: float = 3.0
    """Bound of the learned weights of the two momenta."""
    max_time: float = 3000.0
    """The step number is not told apart beyond this: later steps look like the last one trained for."""


class AdamLSTMRule(UpdateRule):
    r"""Adam's ingredients, combined at every step and coordinate by an LSTM.

    With :math:`m, n` the momenta of decay :math:`\beta_1 < \beta_2`, :math:`v` the second moment, hats for bias
    correction and :math:`d = \sqrt{\hat v} + \epsilon`, let :math:`a = \hat m/d` and :math:`b = \hat n/d`. Then

    .. math::
        (o_0, o_1, o_2) &= W\,\mathrm{LSTM}(a, b, g/d, |a|, |b|, \text{tensor and time features}) + w \\
        s &= B \tanh(\gamma o_0 / B), \qquad r_k = M \tanh(o_k / M) \\
        \Delta\theta &= -\alpha\, e^{s}\, \big((1 + r_1)\, a + r_2\, b\big)

    The tensor features are the log RMS of the parameter, the mean of :math:`a\, g/d` (the alignment of fast momentum
    and gradient), and the log RMS of :math:`b` (how consistent gradients are); the log RMSs are clamped to [-7, 3] and
    divided by 3. The time feature is :math:`\log t`, over its value at ``max_time``. As tensors are seen as wholes,
    splitting a tensor in two changes its updates.

    What follows from the form, whatever the weights (``tests/rules/`` checks each):

    * A coordinate whose gradients have all been zero does not move; nor does anything at ``lr=0``.
    * Multiplying the loss by a constant changes nothing (up to ``eps``).
    * :math:`|\Delta\theta| \le \alpha\, e^{B} \big((1 + M)\,\kappa_1 + M \kappa_2\big)`, where :math:`\kappa_k`
      bounds the normalised momenta (:meth:`update_bound`).
    * Untrained, with the read-out at zero, it is Adam with ``lr = nominal_step``, :math:`\beta_1` and
      :math:`\beta_v`.

    Shapes: state ``h``, ``c`` are ``(num_layers, hidden_size, N)``; ``fast``, ``slow``, ``square`` are ``(N,)``;
    ``step`` is ``(S,)``.

    Source: this project. The inputs follow RNNprop (Lv et al. 2017, arXiv:1703.03633, section 4), the nominal term
    STAR (Harrison et al. 2022, arXiv:2209.11208, section 4).

    >>> from learnedopt.rules import AdamLSTMConfig, Segments
    >>> rule, segments = AdamLSTMRule(AdamLSTMConfig(nominal_step=0.01)), Segments([2])
    >>> delta, _ = rule.update(torch.ones(2), torch.tensor([5.0, -2.0]), rule.init_state(segments), segments)
    >>> delta
    tensor([-0.0100,  0.0100], grad_fn=<MulBackward0>)
    """

    config_class = AdamLSTMConfig
    config: AdamLSTMConfig
    zero_gradient_is_noop = True
    reads_param = False

    def __init__(self, config: AdamLSTMConfig | None = None) -> None:
        super().__init__(config or AdamLSTMConfig())
        config = self.config
        for name in ("fast_decay", "slow_decay", "square_decay"):
            if not 0.0 <= getattr(config, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
        for name in ("eps", "nominal_step", "log_step_gain", "log_step_bound", "mix_bound"):
            if not 0.0 < getattr(config, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
        if config.eps < 1e-18:
            raise ValueError(f"eps must be at least 1e-18, below which float32 squares vanish, got {config.eps}")
        if not 1.0 < config.max_time < math.inf:
            raise ValueError(f"max_time must be above 1 and finite, got {config.max_time}")
        features = _COORDINATE_FEATURES + len(Row) - Row.FEATURES
        self.lstm = CoordinatewiseLSTM(features, config.hidden_size, config.num_layers)
        self.readout = nn.Linear(config.hidden_size, 3)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            **self.lstm.state_spec(),
            "fast": momentum_spec(self.config.fast_decay, self.config.square_decay),
            "slow": momentum_spec(self.config.slow_decay, self.config.square_decay),
            "square": StateSpec(turns_as="square"),
            "step": StateSpec(scope="tensor"),
        }

    def update_bound(self) -> float:
        r"""The largest change of any coordinate in one step at ``lr=1``, for any weights and any gradients.

        With :math:`\kappa_1`, :math:`\kappa_2` what :func:`~learnedopt.rules.moments.momentum_bound` gives for the two
        momenta; infinite unless both ``decay² < square_decay``.
        """
        config = self.config
        fast, slow = (momentum_bound(decay, config.square_decay) for decay in (config.fast_decay, config.slow_decay))
        mix = (1.0 + config.mix_bound) * fast + config.mix_bound * slow
        return config.nominal_step * math.exp(config.log_step_bound) * mix

    def corrections(self, state: State) -> Tensor:
        """Bias corrections of the moments after the step to come, ``(3, S)``: the first rows of the statistics."""
        step, config = state["step"] + 1.0, self.config
        decays = config.fast_decay, config.slow_decay, config.square_decay
        return torch.stack([1.0 / (1.0 - decay**step) for decay in decays])

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        corrections = self.corrections(state)
        _, (a, b, g) = self._directions(grad, state, segments.expand(corrections))
        means = segments.mean(torch.stack([param.square(), a * g, b.square()]))
        return self.statistics_from_means(means, corrections, state, segments.together)

    def statistics_from_means(
        self, means: Tensor, corrections: Tensor, state: State, together: int
    ) -> tuple[Tensor, State]:
        """What :meth:`statistics` gives.

        Args:
            means: Over each tensor, ``(3, S)``: of the squared parameter, ``a * g`` and ``b ** 2``.
            corrections: What :meth:`corrections` gives.
            state: Of tensors; that of coordinates is not read.
            together: How many tensors are trained together, which counts for nothing here.
        """
        step = state["step"] + 1.0
        rms_param, consistency = (means[row].add(1e-12).log() / 6.0 for row in (Mean.PARAM_SQUARE, Mean.SLOW_SQUARE))
        shared = torch.stack(
            [
                rms_param.clamp(-7.0 / 3.0, 1.0),
                means[Mean.FAST_GRAD],
                consistency.clamp(-7.0 / 3.0, 1.0),
                step.clamp(max=self.config.max_time).log() / math.log(self.config.max_time),
            ]
        )
        return torch.cat([corrections, shared]), {"step": step}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        config = self.config
        moments, (a, b, g) = self._directions(grad, state, statistics[: Row.FEATURES])
        shared = statistics[Row.FEATURES :].expand(-1, grad.numel())
        x = torch.cat([torch.stack([a, b, g, a.abs(), b.abs()]), shared])
        top, h, c = self.lstm(x, state["h"], state["c"])
        out = torch.addmm(self.readout.bias.unsqueeze(1), self.readout.weight, top)
        log_step = config.log_step_bound * torch.tanh(out[0] * (config.log_step_gain / config.log_step_bound))
        mix = config.mix_bound * torch.tanh(out[1:] / config.mix_bound)
        direction = (1.0 + mix[0]) * a + mix[1] * b
        return -config.nominal_step * torch.exp(log_step) * direction, {"h": h, "c": c, **moments}

    def _directions(
        self, grad: Tensor, state: State, corrections: Tensor
    ) -> tuple[State, tuple[Tensor, Tensor, Tensor]]:
        """The new moments, and both momenta and the gradient over the running RMS."""
        config = self.config
        # Beyond this the square overflows, and an infinite second moment turns into NaN at the next step.
        limit = 0.5 * math.sqrt(torch.finfo(grad.dtype).max)
        grad = grad.clamp(-limit, limit)
        fast = torch.lerp(grad, state["fast"], config.fast_decay)
        slow = torch.lerp(grad, state["slow"], config.slow_decay)
        square = torch.lerp(grad.square(), state["square"], config.square_decay)
        # The square root of zero has no derivative; the clamp keeps second-order meta-gradients from NaN there.
        rms = (square * corrections[2]).clamp(min=torch.finfo(grad.dtype).tiny).sqrt() + config.eps
        normalised = (fast * corrections[0] / rms, slow * corrections[1] / rms, grad / rms)
        return {"fast": fast, "slow": slow, "square": square}, normalised
