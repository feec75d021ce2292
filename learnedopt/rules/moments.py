"""Running averages of gradients: Adam's two moments, the correction of their bias, and how far they can be apart."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from learnedopt.rules.base import State, StateSpec


def bias_correction(decay: float, step: Tensor) -> Tensor:
    """``1 / (1 - decay**step)``, without the digits that the subtraction would lose in float32."""
    return -1.0 / torch.expm1(step * math.log(decay)) if decay else torch.ones_like(step)


def momentum_bound(decay: float, square_decay: float) -> float:
    r"""The most a momentum can be over the root of a second moment, both bias-corrected, for any gradients.

    By Cauchy-Schwarz :math:`|\hat m_t| \le \kappa \sqrt{\hat v_t}` with :math:`\kappa^2 = \max_t \sum_{j<t} w_j^2 /
    u_j`, :math:`w` and :math:`u` the averaging weights of the two. The sum is finite for :math:`\beta^2 < \beta_v`,
    otherwise this is infinite.
    """
    gap = square_decay - decay * decay
    if gap <= 0.0:
        return math.inf
    return (1.0 - decay) * math.sqrt(square_decay / ((1.0 - square_decay) * gap))


def momentum_spec(decay: float, square_decay: float) -> StateSpec:
    """The state entry of a momentum, where that of the second moment is called ``square``."""
    bound = momentum_bound(decay, square_decay)
    return StateSpec(turns_as="direction", within=("square", bound) if math.isfinite(bound) else None)


def in_range(grad: Tensor) -> Tensor:
    """No larger than what has a square: beyond, an infinite second moment would turn into NaN at the next step."""
    limit = 0.5 * math.sqrt(torch.finfo(grad.dtype).max)
    return grad.clamp(-limit, limit)


class Averaging(Protocol):
    """Settings of Adam's moments."""

    @property
    def momentum_decay(self) -> float: ...

    @property
    def square_decay(self) -> float: ...

    @property
    def eps(self) -> float: ...


def adam_directions(
    grad: Tensor, state: State, corrections: Tensor, config: Averaging
) -> tuple[State, tuple[Tensor, Tensor]]:
    r"""Advance ``momentum`` and ``square``; the momentum and the gradient over the running RMS.

    Returns:
        The new moments, and :math:`\hat m / (\sqrt{\hat v} + \epsilon)` and :math:`g / (\sqrt{\hat v} + \epsilon)`;
        ``corrections`` has :func:`bias_correction` of the two in its rows, for the hats.
    """
    grad = in_range(grad)
    # Not torch.lerp: in float32 it takes 1 - 0.999 for a number that is off by 1e-5 of itself.
    momentum = config.momentum_decay * state["momentum"] + (1.0 - config.momentum_decay) * grad
    square = config.square_decay * state["square"] + (1.0 - config.square_decay) * grad.square()
    # The square root of zero has no derivative; the clamp keeps second-order meta-gradients from NaN there.
    rms = (square * corrections[1]).clamp(min=torch.finfo(grad.dtype).tiny).sqrt() + config.eps
    return {"momentum": momentum, "square": square}, (momentum * corrections[0] / rms, grad / rms)
