"""Meta-objectives: from the losses of an unroll to the number that meta-training lowers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mean(losses: Tensor, initial: Tensor) -> Tensor:
    r"""The plain mean :math:`\frac1T\sum_t f_t`, all weights :math:`w_t` one (Andrychowicz et al. 2016, eq. 3)."""
    return losses.mean()


def log_ratio(losses: Tensor, initial: Tensor) -> Tensor:
    r"""Mean of :math:`\log(\min(f_t/f_0, 20) + 10^{-3})`: every factor of improvement counts alike on every task.

    The cap keeps one diverging task from owning the meta-gradient; the offset, noise at the bottom from owning it.
    """
    ratio = (losses / initial.abs().clamp(min=1e-12)).clamp(max=20.0)
    return (ratio.clamp(min=0.0) + 1e-3).log().mean()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean, "log_ratio": log_ratio}
"""By name; each takes losses ``(steps, copies)`` and initial losses ``(copies,)`` and gives a scalar."""
