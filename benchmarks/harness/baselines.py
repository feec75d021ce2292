"""Hand-written optimizers that learned ones are compared with, and how their learning rates are tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from learnedopt.evaluation.statistics import mean, median

GRID: tuple[float, ...] = tuple(2.0**exponent for exponent in range(-10, 5))
"""Fifteen learning rates, from about 0.001 to 16 by factors of two."""


@dataclass(frozen=True)
class Baseline:
    """An optimizer of ``torch.optim`` with everything fixed but the learning rate.

    >>> BASELINES["nag"]([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    SGD (...
        nesterov: True
    ...)
    """

    make: Callable[..., Optimizer]
    default_lr: float | None = None
    """What ``torch.optim`` uses if none is given, where that is meant as advice: ``None`` for the SGD family."""

    def __call__(self, params: Iterable[Tensor], lr: float) -> Optimizer:
        return self.make(params, lr=lr)


BASELINES: dict[str, Baseline] = {
    "sgd": Baseline(torch.optim.SGD),
    "sgd_momentum": Baseline(partial(torch.optim.SGD, momentum=0.9)),
    "nag": Baseline(partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
    "rmsprop": Baseline(torch.optim.RMSprop, default_lr=0.01),
    "adam": Baseline(torch.optim.Adam, default_lr=0.001),
    "adamw": Baseline(torch.optim.AdamW, default_lr=0.001),
}
"""Every baseline by name; ``"sgd"`` is without momentum. All are elementwise: what one coordinate does depends on its
own gradients alone."""


@dataclass(frozen=True)
class Criterion:
    """How a run is judged: the loss at ``step``, averaged over its last ``window`` steps and over the copies.

    The window takes out noise of the minibatches. ``statistic`` is the average over the copies.
    """

    step: int
    window: int = 1
    statistic: Literal["mean", "median"] = "mean"

    def __post_init__(self) -> None:
        if not 1 <= self.window <= self.step + 1:
            raise ValueError(f"window must be between 1 and step + 1 = {self.step + 1}, got {self.window}")
        if self.statistic not in ("mean", "median"):
            raise ValueError(f"statistic must be 'mean' or 'median', got {self.statistic!r}")

    def values(self, losses: Tensor) -> Tensor:
        """One number per copy, ``(steps + 1, copies) -> (copies,)``; infinite where the run diverged."""
        return losses[self.step + 1 - self.window : self.step + 1].mean(0)

    def __call__(self, losses: Tensor) -> float:
        values = self.values(losses).double().numpy()
        return float(mean(values) if self.statistic == "mean" else median(values))


@dataclass(frozen=True)
class Tuned:
    """The best learning rate of a grid, and the whole grid."""

    lr: float
    scores: dict[float, float]
    """Learning rate to score, in ascending order of learning rate."""

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the smallest or largest tried, so that a better one may lie outside."""
        return self.lr in (min(self.scores), max(self.scores))


def tune(score: Callable[[float], float], grid: Sequence[float] = GRID, extensions: int = 10) -> Tuned:
    """Find the learning rate of the lowest score.

    While the best is at an edge of the grid, the grid grows beyond that edge by its own ratio, up to ``extensions``
    times. If it is still there, :attr:`Tuned.at_edge` says so. Of equal scores, the smallest learning rate's counts.

    Args:
        score: From a learning rate to a number, infinite for failure.
        grid: At least two positive learning rates in ascending order.

    >>> tune(lambda lr: (math.log2(lr) - 6) ** 2).lr
    64.0
    """
    if len(grid) < 2 or list(grid) != sorted(set(grid)) or grid[0] <= 0:
        raise ValueError(f"the grid must be two or more positive learning rates in ascending order, got {grid}")
    scores = {lr: score(lr) for lr in grid}
    for _ in range(extensions):
        best, low, high = _best(scores), min(scores), max(scores)
        if best == low:
            lr = low * grid[0] / grid[1]
        elif best == high:
            lr = high * grid[-1] / grid[-2]
        else:
            break
        scores[lr] = score(lr)
    return Tuned(_best(scores), dict(sorted(scores.items())))


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda lr: (math.inf if math.isnan(scores[lr]) else scores[lr], lr))
