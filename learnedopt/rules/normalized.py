"""Gradients over their running root mean square: the direction of RMSProp, and of Adam without momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule
from learnedopt.rules.moments import bias_correction, in_range, momentum_bound


class Row(IntEnum):
    """Of the statistics."""

    CORRECTION = 0
    FLOOR = 1
    """:math:`c^2`, below which squared gradients count for less."""


class Mean(IntEnum):
    """Of what the rule takes the means of."""

    GRAD_SQUARE = 0


@dataclass(frozen=True)
class NormalizedGradientConfig(RuleConfig):
    """Settings of :class:`NormalizedGradientRule`."""

    kind: ClassVar[str] = "normalized_gradient"
    square_decay: float = 0.999
    """Decay of the second moment, :math:`\\beta`."""
    eps: float = 1e-12
    relative_eps: float = 0.0
    """:math:`\\rho`: a coordinate whose gradients are this small, relative to the RMS of its tensor's, takes a third of
    a step or so, and much less where they are smaller still. In bases, where a coordinate without gradient has
    rounding errors, this keeps them from becoming steps. 0 is without."""


class NormalizedGradientRule(UpdateRule):
    r"""Steps of about one along every coordinate: the gradient over its running root mean square.

    .. math::
        c^2 &= \rho^2\, \overline{g^2}, \qquad h = g\, \frac{g^2}{g^2 + c^2} \\
        v &\leftarrow \beta v + (1 - \beta)\,(h^2 + c^2), \qquad
        \Delta\theta = -\frac{h}{\sqrt{v / (1 - \beta^t)} + \epsilon}

    with :math:`\overline{g^2}` for the mean over the tensor. It is what other rules scale
    (:class:`~learnedopt.rules.ChainRule`), and has nothing to learn. What is far below :math:`c` counts by its third
    power: rounding errors do not become steps, and nothing depends on which side of a threshold they fall.

    * A coordinate whose gradient is zero does not move.
    * Multiplying the loss by a constant changes nothing (up to ``eps``).

    Shapes: ``square`` is ``(N,)`` and ``step`` is ``(S,)``.

    Source: Tieleman & Hinton 2012, *RMSProp* (lecture 6.5), with the correction of the bias of Kingma & Ba 2015
    (arXiv:1412.6980, algorithm 1).

    >>> rule, segments = NormalizedGradientRule(), Segments([2])
    >>> rule.update(torch.ones(2), torch.tensor([5.0, -2.0]), rule.init_state(segments), segments)[0]
    tensor([-1.,  1.])
    """

    config_class = NormalizedGradientConfig
    config: NormalizedGradientConfig
    zero_gradient_is_noop = True
    reads_param = False

    def __init__(self, config: NormalizedGradientConfig | None = None) -> None:
        super().__init__(config or NormalizedGradientConfig())
        config = self.config
        if not 0.0 <= config.square_decay < 1.0:
            raise ValueError(f"square_decay must be in [0, 1), got {config.square_decay}")
        if not 1e-18 <= config.eps < math.inf:
            raise ValueError(f"eps must be finite and at least 1e-18, below which float32 squares vanish: {config.eps}")
        if not 0.0 <= config.relative_eps < math.inf:
            raise ValueError(f"relative_eps must be finite and not negative, got {config.relative_eps}")

    def state_spec(self) -> dict[str, StateSpec]:
        return {"square": StateSpec(turns_as="square"), "step": StateSpec(scope="tensor")}

    def update_bound(self, *, turning: bool = False) -> float:
        """The largest change of any coordinate in one step, for any gradients.

        Args:
            turning: Where bases turn, and what a coordinate's second moment was becomes others'.
        """
        bound = momentum_bound(0.0, self.config.square_decay)
        return max(1.0, 1.0 / math.sqrt(1.0 - self.config.square_decay)) if turning else bound

    def corrections(self, state: State) -> Tensor:
        """The first row of the statistics, ``(1, S)``: the bias correction after the step to come."""
        return bias_correction(self.config.square_decay, state["step"] + 1.0)[None]

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        means = segments.mean(in_range(grad).square()[None])
        return self.statistics_from_means(means, self.corrections(state), state, segments.together)

    def statistics_from_means(
        self, means: Tensor, corrections: Tensor, state: State, together: int
    ) -> tuple[Tensor, State]:
        """What :meth:`statistics` gives, from the means of squared gradients, ``(1, S)``."""
        square = means[Mean.GRAD_SQUARE]
        # Not a product with zero: a gradient that is not finite is to spoil its own coordinate alone.
        floor = self.config.relative_eps**2 * square if self.config.relative_eps else torch.zeros_like(square)
        return torch.stack([corrections[0], floor]), {"step": state["step"] + 1.0}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        decay, grad, tiny = self.config.square_decay, in_range(grad), torch.finfo(grad.dtype).tiny
        floor = statistics[Row.FLOOR]
        if self.config.relative_eps:
            grad = grad * (grad.square() / (grad.square() + floor).clamp(min=tiny))
        square = decay * state["square"] + (1.0 - decay) * (grad.square() + floor)
        # The square root of zero has no derivative; the clamp keeps second-order meta-gradients from NaN there.
        mean = (square * statistics[Row.CORRECTION]).clamp(min=tiny)
        return -grad / (mean.sqrt() + self.config.eps), {"square": square}
