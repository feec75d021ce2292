"""Schedule-Free Adam with a modulator, which chooses step sizes, directions and averaging: the frame of the default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule
from learnedopt.rules.modulators import CoordinateLSTM, PowerLaws, TensorController
from learnedopt.rules.moments import adam_directions, bias_correction, momentum_bound, momentum_spec

_COORDINATE_FEATURES = 4
_AVERAGES = ("slope", "steepness", "distance")


class Row(IntEnum):
    """Of the statistics: bias corrections, the averaging weight, one over the RMS of the offset, and then the features
    that every coordinate of a tensor shares."""

    MOMENTUM_CORRECTION = 0
    SQUARE_CORRECTION = 1
    AVERAGING = 2
    PER_OFFSET = 3
    LOG_PARAM = 4
    ALIGNMENT = 5
    CONSISTENCY = 6
    OFFSET_COSINE = 7
    LOG_OFFSET = 8
    TIME = 9
    WAY = 10
    TOGETHER = 11
    SMALLNESS = 12
    BEGINNING = 13
    FEATURES = LOG_PARAM  # where they begin


class Mean(IntEnum):
    """Of what the rule takes the means of: ``a`` and ``g`` are the momentum and the gradient over the running RMS."""

    PARAM_SQUARE = 0
    A_G = 1
    A_SQUARE = 2
    OFFSET_SQUARE = 3
    OFFSET_A = 4
    SLOPE_WAY = 5
    SLOPE_SQUARE = 6
    WAY_SQUARE = 7


@dataclass(frozen=True)
class ScheduleFreeConfig(RuleConfig):
    """Settings of :class:`ScheduleFreeRule`."""

    kind: ClassVar[str] = "schedule_free"
    modulator: PowerLaws | CoordinateLSTM | TensorController = PowerLaws()
    """What chooses step sizes, directions and averaging (:mod:`learnedopt.rules.modulators`)."""
    momentum_decay: float = 0.9
    """Decay of the momentum :math:`m`."""
    square_decay: float = 0.999
    """Decay of the second moment, :math:`\\beta_v`."""
    way_decay: float = 0.9995
    """Decay of the averages behind the correlation of gradients with the way back, :math:`\\beta_w`."""
    way_gain: float = 30.0
    """:math:`\\kappa`: as a feature, a correlation well beyond one over this counts for its sign alone."""
    usual_scale: float = 0.1
    """Tensors whose RMS is smaller than this at the first step count as small."""
    warmup: float = 10.0
    """How many steps count as the beginning."""
    eps: float = 1e-12
    nominal_step: float = 0.015
    """Step size before training, when the read-out is zero."""
    interpolation: float = 0.9
    """:math:`\\beta`: where between the fast sequence (0) and its average (1) gradients are taken."""
    averaging_power: float = 3.0
    """:math:`k`: before training, the iterate of step :math:`j` has about the weight :math:`j^k` in the average."""
    log_step_gain: float = 3.0
    log_step_bound: float = 5.0
    """The learned step size stays within a factor ``exp(log_step_bound)`` of ``nominal_step``."""
    mix_bound: float = 3.0
    """Bound of the learned weights of gradient and momentum."""
    log_averaging_bound: float = 1.5
    """The learned averaging weight stays within a factor ``exp(log_averaging_bound)`` of the nominal one."""
    max_time: float = 3000.0
    """As a feature, the step number is not told apart beyond this. The averaging weight goes on falling."""


class ScheduleFreeRule(UpdateRule):
    r"""Schedule-Free Adam, its step sizes, directions and averaging chosen at every step and coordinate by a modulator.

    Schedule-Free optimization moves a fast sequence :math:`z`, averages it into :math:`x`, and takes gradients in
    between, at :math:`\theta = \beta x + (1-\beta) z`; averaging does what a decaying step size is otherwise needed
    for, without knowing how long the run is. Here :math:`\theta` are the parameters, and what it takes to remember is
    the offset :math:`d = z - \theta`. With :math:`m` the momentum, :math:`v` the second moment, hats for bias
    correction, :math:`\tilde g = g/(\sqrt{\hat v} + \epsilon)` and :math:`a = \hat m/(\sqrt{\hat v} + \epsilon)`, let

    .. math::
        f &= (a, \tilde g, |a|, d / \mathrm{rms}(d), \text{tensor and time features}) \\
        (o_0, \dots, o_3) &= \mathrm{modulator}(f) \\
        s &= \alpha\, e^{S \tanh(\gamma o_0 / S)}\, \big((1 + r_1)\, \tilde g + r_2\, a\big),
            \qquad r_k = M \tanh(o_k / M) \\
        c &= \min\!\Big(1,\ \frac{k + 1}{t + k}\, e^{C \tanh(o_3 / C)}\Big) \\
        \Delta\theta &= c\, d - (1 - \beta + \beta c)\, s, \qquad d \leftarrow (1 - c)(d - \beta s)

    which is :math:`z \leftarrow z - s`, :math:`x \leftarrow (1 - c) x + c z` in other coordinates. The modulator is
    :class:`~learnedopt.rules.PowerLaws` :math:`W f + w`, by which step sizes are power laws of time, of a tensor's
    size and so on, or another of :mod:`learnedopt.rules.modulators`. The tensor features are the log RMS of the
    parameter, the mean of :math:`a \tilde g` (the alignment of momentum and gradient), the log RMS of :math:`a`
    (how consistent gradients are), the cosine between :math:`d` and :math:`-a`, and the log RMS of :math:`d` over
    that of the parameter; the log RMSs and their difference are divided by 3 and clamped to [-7/3, 1]. Then come
    :math:`\log t`, over its value at ``max_time``, and the *way*, by which too large steps show:

    .. math::
        \tanh\left(\kappa\, \frac{\overline{\langle g,\, \theta_0 - \theta \rangle}}
            {\left(\overline{\|g\|^2}\; \overline{\|\theta_0 - \theta\|^2}\right)^{1/2}}\right)

    with bars for running averages of decay :math:`\beta_w` and :math:`\theta_0` for the parameters at the first step.
    Where it is negative, a tensor has gone so far that the way back is downhill. The last three are there for networks
    that want small steps, deep ones and wide ones: the log of the number of tensors that are trained together; the
    *smallness*, the log of the tensor's RMS at the first step over ``usual_scale``, where that is negative and the RMS
    not zero (both over 3, as above); and :math:`e^{-(t-1)/\tau}`, :math:`\tau` being ``warmup``. As tensors are seen as
    wholes and counted, splitting one in two changes all updates.

    What follows from the form, whatever the weights (``tests/rules/`` checks each):

    * A coordinate whose gradients have all been zero does not move; nor does anything at ``lr=0``.
    * Multiplying the loss by a constant changes nothing (up to ``eps``).
    * :math:`|\Delta\theta|` has a bound (:meth:`update_bound`).
    * Untrained, with all outputs zero, it is Schedule-Free Adam with step size :math:`\alpha` and polynomial
      averaging.

    ``lr`` multiplies :math:`\Delta\theta`, which is the same as multiplying :math:`s`, as long as it does not change.

    Shapes: ``momentum``, ``square``, ``offset``, ``origin`` (:math:`\theta_0`) are ``(N,)``; ``step``, ``smallness``,
    and the three averages ``slope``, ``steepness`` and ``distance`` are ``(S,)``; the modulator may have more.

    Source: this project. The form is that of Defazio et al. 2024, *The Road Less Scheduled* (arXiv:2405.15682, section
    2), the nominal averaging weight that of Shamir & Zhang 2013 (arXiv:1212.1824, section 4), the nominal term an idea
    of STAR (Harrison et al. 2022, arXiv:2209.11208, section 4), and the product of gradient and way what the distance
    estimates of Mishchenko & Defazio 2023 (Prodigy, arXiv:2306.06101, section 3) are made of.

    >>> rule, segments = ScheduleFreeRule(ScheduleFreeConfig(nominal_step=0.01)), Segments([2])
    >>> param, grad = torch.ones(2), torch.tensor([5.0, -2.0])
    >>> delta, _ = rule.update(param, grad, rule.init_state(segments, param=param), segments)
    >>> delta
    tensor([-0.0100,  0.0100], grad_fn=<SubBackward0>)
    """

    config_class = ScheduleFreeConfig
    config: ScheduleFreeConfig
    zero_gradient_is_noop = True
    counts_tensors = True
    reads_param = False
    way_limit: ClassVar[float] = 1e14
    """Gradients and ways are taken to be no larger in the averages, so that sums of squares are finite in float32."""

    def __init__(self, config: ScheduleFreeConfig | None = None) -> None:
        super().__init__(config or ScheduleFreeConfig())
        _check(self.config)
        self.modulator = self.config.modulator.build(_COORDINATE_FEATURES, len(Row) - Row.FEATURES, outputs=4)

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            **self.modulator.state_spec(),
            "momentum": momentum_spec(self.config.momentum_decay, self.config.square_decay),
            "square": StateSpec(turns_as="square"),
            "offset": StateSpec(turns_as="direction"),
            "origin": StateSpec(starts_at="param"),
            **{name: StateSpec(scope="tensor") for name in ("step", "smallness", *_AVERAGES)},
        }

    def update_bound(self, *, turning: bool = False) -> float:
        r"""The largest change of any coordinate in one step at ``lr=1``, for any weights and any gradients.

        Args:
            turning: Where bases turn, and the momentum is cut to what the second moment allows.

        With :math:`\kappa` from :func:`~learnedopt.rules.moments.momentum_bound`,
        :math:`|s| \le \sigma = \alpha\, e^{S}\, ((1 + M)\, \kappa_{\tilde g} + M \kappa_a)`. Averaging weights never
        fall below :math:`e^{-2C}` times what a later one can be, so :math:`|c\, d| \le \beta e^{2C} \sigma` and
        :math:`|\Delta\theta| \le (1 + \beta e^{2C})\, \sigma`. Infinite unless ``momentum_decay² < square_decay``.
        """
        config = self.config
        gradient, momentum = (momentum_bound(decay, config.square_decay) for decay in (0.0, config.momentum_decay))
        if turning:  # in the first steps, corrections of the bias may let more through than the bound on the momentum
            early = max(1.0, math.sqrt(1.0 - config.square_decay) / (1.0 - config.momentum_decay))
            gradient, momentum = early * gradient, early * momentum
        mix = (1.0 + config.mix_bound) * gradient + config.mix_bound * momentum
        step = config.nominal_step * math.exp(config.log_step_bound) * mix
        return step * (1.0 + config.interpolation * math.exp(2.0 * config.log_averaging_bound))

    def corrections(self, state: State) -> Tensor:
        """The first rows of the statistics, ``(2, S)``: bias corrections of the moments after the step to come."""
        step, decays = state["step"] + 1.0, (self.config.momentum_decay, self.config.square_decay)
        return torch.stack([bias_correction(decay, step) for decay in decays])

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
        _, (a, g) = adam_directions(grad, state, segments.expand(corrections), self.config)
        # The way is much smaller than the parameters: in bases, rounding them would be most of it.
        slope = (grad if own_grad is None else own_grad).clamp(-self.way_limit, self.way_limit)
        way = (state["origin"] - param).clamp(-self.way_limit, self.way_limit)
        # At the first step it is zero, and so is its derivative: none that others would have to cancel.
        way = torch.where(segments.expand(state["step"]) > 0.0, way, 0.0)
        offset = state["offset"]
        products = [param.square(), a * g, a.square(), offset.square(), offset * a]
        means = segments.mean(torch.stack([*products, slope * way, slope.square(), way.square()]))
        return self.statistics_from_means(means, corrections, state, segments.together)

    def statistics_from_means(
        self, means: Tensor, corrections: Tensor, state: State, together: int
    ) -> tuple[Tensor, State]:
        r"""What :meth:`statistics` gives.

        Args:
            means: Over each tensor, ``(8, S)``: of the squared parameter, :math:`a \tilde g`, :math:`a^2`,
                :math:`d^2`, :math:`d\, a`, and of gradient and way, both clamped, the product and the squares.
            corrections: What :meth:`corrections` gives.
            state: Of tensors; that of coordinates is not read.
            together: How many tensors are trained together.
        """
        config = self.config
        step, keep = state["step"] + 1.0, config.way_decay
        averages = {
            name: keep * state[name] + (1.0 - keep) * mean for name, mean in zip(_AVERAGES, means[Mean.SLOPE_WAY :])
        }
        # Two roots, because the product of two squares may leave the range of float32 where neither does.
        roots = [averages[name].clamp(min=1e-30).sqrt() for name in ("steepness", "distance")]
        correlation = averages["slope"] / roots[0] / roots[1]
        averaging = (config.averaging_power + 1.0) / (step + config.averaging_power)
        rms_offset, rms_a = (means[row].clamp(min=1e-24).sqrt() for row in (Mean.OFFSET_SQUARE, Mean.A_SQUARE))
        log_param, log_a, log_offset = (
            means[row].add(1e-12).log() / 6.0 for row in (Mean.PARAM_SQUARE, Mean.A_SQUARE, Mean.OFFSET_SQUARE)
        )
        param_square = means[Mean.PARAM_SQUARE]
        smallness = (param_square.clamp(min=1e-30).log() / 2.0 - math.log(config.usual_scale)).clamp(-7.0, 0.0) / 3.0
        smallness = torch.where(param_square > 0.0, smallness, 0.0)
        smallness = torch.where(step == 1.0, smallness, state["smallness"])
        shared = torch.stack(
            [
                log_param.clamp(-7.0 / 3.0, 1.0),
                means[Mean.A_G],
                log_a.clamp(-7.0 / 3.0, 1.0),
                -means[Mean.OFFSET_A] / (rms_offset * rms_a),
                (log_offset - log_param).clamp(-7.0 / 3.0, 1.0),
                step.clamp(max=config.max_time).log() / math.log(config.max_time),
                torch.tanh(config.way_gain * correlation),
                torch.full_like(step, math.log(max(together, 1)) / 3.0),
                smallness,
                torch.exp((1.0 - step) / config.warmup),
            ]
        )
        shared, of_tensors = self.modulator.of_tensors(shared, state)
        statistics = torch.cat([corrections, averaging[None], 1.0 / rms_offset[None], shared])
        return statistics, {"step": step, "smallness": smallness, **averages, **of_tensors}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        config = self.config
        offset = state["offset"]
        moments, (a, g) = adam_directions(grad, state, statistics, config)
        averaging, shared = statistics[Row.AVERAGING], statistics[Row.FEATURES :].expand(-1, grad.numel())
        seen = torch.cat([torch.stack([a, g, a.abs(), offset * statistics[Row.PER_OFFSET]]), shared])
        out, units = self.modulator(seen, state)
        log_step = config.log_step_bound * torch.tanh(out[0] * (config.log_step_gain / config.log_step_bound))
        mix = config.mix_bound * torch.tanh(out[1:3] / config.mix_bound)
        log_weight = config.log_averaging_bound * torch.tanh(out[3] / config.log_averaging_bound)
        weight = (averaging * torch.exp(log_weight)).clamp(max=1.0)
        move = config.nominal_step * torch.exp(log_step) * ((1.0 + mix[0]) * g + mix[1] * a)
        beta = config.interpolation
        delta = weight * offset - (1.0 - beta + beta * weight) * move
        return delta, {**units, **moments, "offset": (1.0 - weight) * (offset - beta * move)}


def _check(config: ScheduleFreeConfig) -> None:
    """Raise ``ValueError`` where a setting is out of range."""
    for name in ("momentum_decay", "square_decay", "way_decay", "interpolation"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    positive = ("eps", "way_gain", "usual_scale", "warmup", "nominal_step", "log_step_gain", "log_step_bound")
    for name in (*positive, "mix_bound", "log_averaging_bound"):
        if not 0.0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
    if config.eps < 1e-18:
        raise ValueError(f"eps must be at least 1e-18, below which float32 squares vanish, got {config.eps}")
    if not 0.0 <= config.averaging_power < math.inf:
        raise ValueError(f"averaging_power must be finite and not negative, got {config.averaging_power}")
    if not 1.0 < config.max_time < math.inf:
        raise ValueError(f"max_time must be above 1 and finite, got {config.max_time}")
