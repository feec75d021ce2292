"""Meta-objectives: from the losses of an unroll to the numbers that meta-training lowers, one per copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def loss(losses: Tensor, initial: Tensor) -> Tensor:
    r"""The losses themselves, :math:`f_t` (Andrychowicz et al. 2016, eq. 3)."""
    return losses


def log(losses: Tensor, initial: Tensor) -> Tensor:
    r""":math:`\log \max(f_t, 10^{-10})`: a factor counts alike however low the loss already is."""
    return losses.clamp(min=1e-10).log()


def ratio(losses: Tensor, initial: Tensor) -> Tensor:
    r""":math:`f_t / |f_0|`: tasks of different scales count alike (the scaled loss of Metz et al. 2019)."""
    return losses / initial.abs().clamp(min=1e-12)


def log_ratio(losses: Tensor, initial: Tensor) -> Tensor:
    r""":math:`\log(\min(f_t/|f_0|, 20) + 10^{-3})`: every factor of improvement counts alike on every task.

    The cap keeps one diverging task from owning the meta-gradient; the offset, noise at the bottom from owning it.
    """
    return (ratio(losses, initial).clamp(min=0.0, max=20.0) + 1e-3).log()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": loss,
    "log": log,
    "ratio": ratio,
    "log_ratio": log_ratio,
}
"""By name; each takes losses ``(steps, copies)`` and initial losses ``(copies,)`` and gives ``(steps, copies)``."""


def uniform(steps: int) -> Tensor:
    r""":math:`w_t = 1/T`: all along the window (Andrychowicz et al. 2016)."""
    return torch.full((steps,), 1.0 / steps)


def linear(steps: int) -> Tensor:
    r""":math:`w_t \propto t`: later steps count more."""
    weights = torch.arange(1.0, steps + 1.0)
    return weights / weights.sum()


def last(steps: int) -> Tensor:
    r""":math:`w_T = 1`, the others zero: only where the window ends (RNNprop, Lv et al. 2017)."""
    weights = torch.zeros(steps)
    weights[-1] = 1.0
    return weights


WEIGHTINGS: dict[str, Callable[[int], Tensor]] = {"uniform": uniform, "linear": linear, "last": last}
"""By name; each gives the weights :math:`w_t` of a window's steps, which sum to one."""


def meta_losses(losses: Tensor, initial: Tensor, objective: str, weighting: str = "uniform") -> Tensor:
    r"""What is lowered: :math:`\sum_t w_t\, J(f_t, f_0)` for every copy.

    Args:
        losses: After each step, ``(steps, copies)``.
        initial: At the start of the episode, ``(copies,)``.
        objective: J, a name in :data:`OBJECTIVES`.
        weighting: w, a name in :data:`WEIGHTINGS`.

    Returns:
        ``(copies,)``.

    >>> meta_losses(torch.tensor([[4.0], [2.0]]), torch.tensor([8.0]), "ratio", "last")
    tensor([0.2500])
    """
    weights = WEIGHTINGS[weighting](len(losses)).to(losses)
    values = OBJECTIVES[objective](losses, initial)
    # A weight of zero must hide a step whatever its loss: zero times infinity would be NaN.
    return weights @ torch.where(weights.unsqueeze(1) > 0, values, 0.0)
