"""Step sizes and averaging by learned laws: the second half of the default, which says how far to go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor, nn

from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule

_AVERAGES = ("slope", "steepness", "distance")


class Row(IntEnum):
    """Of the statistics."""

    FROM_OFFSET = 0
    """What of the offset the parameters take."""
    FROM_DIRECTION = 1
    """What of the direction they take."""
    STEP = 2
    """The step size."""
    KEPT = 3
    """What of the offset is left."""


class Mean(IntEnum):
    """Of what the rule takes the means of."""

    SLOPE_WAY = 0
    SLOPE_SQUARE = 1
    WAY_SQUARE = 2
    PARAM_SQUARE = 3


class Law(IntEnum):
    """The features of a tensor that its log step size is linear in."""

    ONE = 0
    LOG_TIME = 1
    WAY = 2
    LOG_TOGETHER = 3
    LOG_SMALLNESS = 4
    BEGINNING = 5


@dataclass(frozen=True)
class LawsConfig(RuleConfig):
    """Settings of :class:`LawsRule`."""

    kind: ClassVar[str] = "laws"
    way_decay: float = 0.9995
    """Decay of the averages behind the correlation of gradients with the way back, :math:`\\beta_w`."""
    way_gain: float = 30.0
    """:math:`\\kappa`: as a feature, a correlation well beyond one over this counts for its sign alone."""
    usual_scale: float = 0.1
    """Tensors whose RMS is smaller than this at the first step count as small."""
    warmup: float = 10.0
    """How many steps count as the beginning, :math:`\\tau`."""
    nominal_step: float = 0.02
    """Step size before training, :math:`\\alpha`."""
    interpolation: float = 0.9
    """:math:`\\beta`: where between the fast sequence (0) and its average (1) gradients are taken at first."""
    settling_time: float = 1000.0
    """Steps after which that place begins to close in on the average, :math:`T`."""
    settling_power: float = 1.0
    """How fast it does, :math:`q`; 0 is never."""
    averaging_power: float = 3.0
    """:math:`k`: before training, the iterate of step :math:`j` has about the weight :math:`j^k` in the average."""
    log_step_bound: float = 5.0
    """The learned step size stays within a factor ``exp(log_step_bound)`` of ``nominal_step``, :math:`S`."""
    log_averaging_bound: float = 1.5
    """The learned averaging weight stays within a factor ``exp(log_averaging_bound)`` of the nominal one, :math:`C`."""
    max_time: float = 3000.0
    """For step sizes, later steps count as this one."""
    schedule_power: float = 0.1
    """How much a schedule counts that decays, :math:`p`: 1 is fully, 0 not at all."""


class LawsRule(UpdateRule):
    r"""How far to go along directions that another rule chose: Schedule-Free averaging, with learned laws for sizes.

    Schedule-Free optimization moves a fast sequence :math:`z`, averages it into :math:`x`, and takes gradients in
    between, at :math:`\theta = x + \eta\,(z - x)`. Averaging does what a decaying step size is otherwise needed for,
    without knowing how long the run is. What it takes to remember is the offset :math:`e = z - x`. With :math:`u` the
    direction, let :math:`s = \lambda \sigma u` and

    .. math::
        c &= \min\!\Big(1,\ \frac{k + 1}{t + k}\, e^{C \tanh(b / C)}\Big), \qquad
        \eta_t = (1 - \beta) \min(1, T / t)^q \\
        \Delta\theta &= (c + \eta_t (1 - c))\,(e - s) - \eta_{t-1}\, e, \qquad e \leftarrow (1 - c)(e - s)

    which is :math:`z \leftarrow z - s`, :math:`x \leftarrow (1 - c)\, x + c\, z`, :math:`\theta = x + \eta_t (z - x)`
    in other coordinates. The step size is a law of the tensor and of time, the same for all of a tensor's coordinates:

    .. math:: \sigma = \alpha\, e^{S \tanh(w \cdot f / S)}

    with :math:`f` (:class:`Law`): one; :math:`\log t`, up to ``max_time``; the *way* (below); the log of the number of
    tensors that are trained together; the log of the tensor's RMS at the first step over ``usual_scale``, between
    -7 and 0, and 0 where the RMS is; :math:`e^{-(t-1)/\tau}`. So weights are exponents: of time, of the number of
    tensors, of smallness. The way is

    .. math::
        \tanh\left(\kappa\, \frac{\overline{\langle g,\, \theta_0 - \theta \rangle}}
            {\left(\overline{\|g\|^2}\; \overline{\|\theta_0 - \theta\|^2}\right)^{1/2}}\right)

    with bars for running averages of decay :math:`\beta_w`, :math:`g` for the gradient itself and :math:`\theta_0` for
    the parameters at the first step. Where it is negative, a tensor has gone so far that the way back is downhill.

    :math:`\lambda` is 1, or what ``lr`` is. Averaging is this rule's schedule, and one that decays adds nothing to it:
    of what ``lr`` falls below the largest it has been, :math:`\lambda_{\max}`, only a power counts,
    :math:`\lambda = \lambda_{\max} (\mathrm{lr} / \lambda_{\max})^p`. At zero itself nothing moves.

    What follows from the form, whatever the weights (``tests/rules/`` checks each):

    * A coordinate whose directions have all been zero does not move; nor does anything at ``lr=0``.
    * :math:`|\Delta\theta|` has a bound (:meth:`update_bound`).
    * Untrained, it is Schedule-Free SGD along the directions, with polynomial averaging.

    Shapes: ``offset`` and ``origin`` (:math:`\theta_0`) are ``(N,)``; ``step``, ``smallness``, ``peak``
    (:math:`\lambda_{\max}`) and the averages ``slope``, ``steepness`` and ``distance`` are ``(S,)``.

    Source: this project. The form is that of Defazio et al. 2024, *The Road Less Scheduled* (arXiv:2405.15682, section
    2), the nominal averaging weight that of Shamir & Zhang 2013 (arXiv:1212.1824, section 4), and the product of
    gradient and way what the distance estimates of Mishchenko & Defazio 2023 (Prodigy, arXiv:2306.06101, section 3) are
    made of.

    >>> rule, segments = LawsRule(LawsConfig(nominal_step=0.01)), Segments([2])
    >>> param, direction = torch.ones(2), torch.tensor([1.0, -1.0])
    >>> delta, _ = rule.update(param, direction, rule.init_state(segments, param=param), segments)
    >>> delta.detach()
    tensor([-0.0100,  0.0100])
    """

    config_class = LawsConfig
    config: LawsConfig
    zero_gradient_is_noop = True
    counts_tensors = True
    reads_param = False
    way_limit: ClassVar[float] = 1e14
    """Gradients and ways are taken to be no larger in the averages, so that sums of squares are finite in float32."""

    def __init__(self, config: LawsConfig | None = None) -> None:
        super().__init__(config or LawsConfig())
        _check(self.config)
        self.step_size = nn.Parameter(torch.zeros(len(Law)))
        self.averaging = nn.Parameter(torch.zeros(1))

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            "offset": StateSpec(turns_as="direction"),
            "origin": StateSpec(starts_at="param"),
            **{name: StateSpec(scope="tensor") for name in ("step", "smallness", "peak", *_AVERAGES)},
        }

    def update_bound(self) -> float:
        r"""The largest change of any coordinate in one step at ``lr=1``, for any weights, relative to directions.

        Steps are at most :math:`\alpha e^S` long. Averaging weights are :math:`r (k + 1) / (t + k)` for one :math:`r`,
        so that :math:`c\,|e|` is no longer than the longest of them, and so is :math:`|\Delta\theta|` at most twice.
        """
        return 2.0 * self.config.nominal_step * math.exp(self.config.log_step_bound)

    def corrections(self, state: State) -> Tensor:
        """None: no row of the statistics follows from the number of steps alone."""
        return state["step"].new_empty(0, len(state["step"]))

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        slope = (grad if own_grad is None else own_grad).clamp(-self.way_limit, self.way_limit)
        way = (state["origin"] - param).clamp(-self.way_limit, self.way_limit)
        # At the first step it is zero, and so is its derivative: none that others would have to cancel.
        way = torch.where(segments.expand(state["step"]) > 0.0, way, 0.0)
        means = segments.mean(torch.stack([slope * way, slope.square(), way.square(), param.square()]))
        return self.statistics_from_means(means, self.corrections(state), state, segments.together)

    def statistics_from_means(
        self, means: Tensor, corrections: Tensor, state: State, together: int
    ) -> tuple[Tensor, State]:
        r"""What :meth:`statistics` gives.

        Args:
            means: Over each tensor, ``(4, S)``: of gradient and way, both clamped, the product and the squares, and of
                the squared parameter, which is read in the first step only.
            corrections: What :meth:`corrections` gives.
            state: Of tensors; that of coordinates is not read.
            together: How many tensors are trained together.
        """
        config, before = self.config, state["step"]
        step, keep = before + 1.0, self.config.way_decay
        averages = {name: keep * state[name] + (1.0 - keep) * mean for name, mean in zip(_AVERAGES, means)}
        # Two roots, because the product of two squares may leave the range of float32 where neither does.
        roots = [averages[name].clamp(min=1e-30).sqrt() for name in ("steepness", "distance")]
        correlation = averages["slope"] / roots[0] / roots[1]
        square = means[Mean.PARAM_SQUARE]
        smallness = (square.clamp(min=1e-30).log() / 2.0 - math.log(config.usual_scale)).clamp(-7.0, 0.0)
        smallness = torch.where(before > 0.0, state["smallness"], torch.where(square > 0.0, smallness, 0.0))
        features = [
            torch.ones_like(step),
            step.clamp(max=config.max_time).log(),
            torch.tanh(config.way_gain * correlation),
            torch.full_like(step, math.log(max(together, 1))),
            smallness,
            torch.exp((1.0 - step) / config.warmup),
        ]
        log_step = _bounded(self.step_size @ torch.stack(features), config.log_step_bound)
        sigma = config.nominal_step * torch.exp(log_step)
        nominal = (config.averaging_power + 1.0) / (step + config.averaging_power)
        weight = (nominal * torch.exp(_bounded(self.averaging, config.log_averaging_bound))).clamp(max=1.0)
        taken = weight + self._place(step) * (1.0 - weight)
        rows = torch.stack([taken - self._place(before), taken * sigma, sigma, 1.0 - weight])
        return rows, {"step": step, "smallness": smallness, **averages}

    def _place(self, step: Tensor) -> Tensor:
        """Where between average and fast sequence the parameters are after so many steps."""
        config = self.config
        late = (config.settling_time / step.clamp(min=config.settling_time)).pow(config.settling_power)
        return (1.0 - config.interpolation) * late

    def with_lr(self, statistics: Tensor, state: State, lr: float | Tensor) -> tuple[Tensor, State]:
        from_offset, from_direction, step, kept = statistics
        peak = state["peak"].clamp(min=lr) if isinstance(lr, float) else torch.maximum(state["peak"], lr)
        moves = torch.full_like(step, lr) != 0.0 if isinstance(lr, float) else (lr != 0.0).expand(step.shape)
        # Divided by lr, by which the update will be multiplied.
        least = torch.where(moves, peak, 1.0)
        counted = least * (torch.where(moves, lr / least, 1.0)).pow(self.config.schedule_power)
        divisor = torch.where(moves, lr + torch.zeros_like(step), 1.0)
        rows = [
            torch.where(moves, from_offset / divisor, 0.0),
            torch.where(moves, from_direction * counted / divisor, 0.0),
            torch.where(moves, step * counted, 0.0),
            torch.where(moves, kept, 1.0),
        ]
        return torch.stack(rows), {"peak": peak}

    def average(self, param: Tensor, state: State) -> Tensor:
        return param - self._place(state["step"]) * state["offset"]

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        """The update for directions in place of gradients."""
        offset, rows = state["offset"], statistics
        delta = rows[Row.FROM_OFFSET] * offset - rows[Row.FROM_DIRECTION] * grad
        return delta, {"offset": rows[Row.KEPT] * (offset - rows[Row.STEP] * grad)}


def _bounded(x: Tensor, bound: float) -> Tensor:
    return bound * torch.tanh(x / bound)


def _check(config: LawsConfig) -> None:
    """Raise ``ValueError`` where a setting is out of range."""
    for name in ("way_decay", "interpolation"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    positive = ("way_gain", "usual_scale", "warmup", "nominal_step", "log_step_bound", "log_averaging_bound")
    for name in positive:
        if not 0.0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
    for name in ("averaging_power", "settling_power", "schedule_power"):
        if not 0.0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {getattr(config, name)}")
    for name in ("max_time", "settling_time"):
        if not 1.0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 1 and finite, got {getattr(config, name)}")
