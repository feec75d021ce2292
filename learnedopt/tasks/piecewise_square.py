"""The convex function of Lv et al. 2017: squares that stop growing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, TaskFamily
from learnedopt.tasks.functions import FunctionTask, check_dimension


@dataclass(frozen=True, eq=False)
class PiecewiseSquareTask(FunctionTask):
    """One draw of :class:`PiecewiseSquare`; the batch is the center, ``(copies, dimension)``."""

    ceiling: float

    def loss(self, params: Params, batch: Batch) -> Tensor:
        (center,) = batch
        return (params["theta"] - center).square().clamp(max=self.ceiling).mean()


@dataclass(frozen=True)
class PiecewiseSquare(TaskFamily):
    r"""Minimize :math:`\frac 1n \sum_i \min\bigl((\theta_i - a_i)^2, c\bigr)`, each a_i uniform in [-1, 1].

    Beyond the ceiling c a coordinate has no gradient at all, so that a rule that overshoots does not come back. With
    twenty dimensions, c = 10 and a start at zero it is the second training task of Lv et al. 2017 (RNNprop,
    arXiv:1703.03633) as their code has it, where :class:`Reparametrized` scales its coordinates by
    exp U(-1, 1): ``Reparametrized(PiecewiseSquare(), (1, 1), (math.exp(-1), math.exp(1)))``.

    Raises ``ValueError`` unless ``dimension`` and ``ceiling`` are positive.

    >>> task = PiecewiseSquare(dimension=3).draw(torch.Generator().manual_seed(0), copies=2)
    >>> (center,) = task.sample(torch.Generator())
    >>> float(task.loss({"theta": center[0] + 100}, (center[0],)))
    10.0
    """

    dimension: int = 20
    ceiling: float = 10.0
    initial_std: float = 0.0

    def __post_init__(self) -> None:
        check_dimension(self.dimension)
        if not self.ceiling > 0:
            raise ValueError(f"ceiling must be positive, got {self.ceiling}")

    def draw(self, generator: Generator, copies: int) -> PiecewiseSquareTask:
        center = torch.rand(copies, self.dimension, generator=generator).mul(2).sub(1)
        return PiecewiseSquareTask(copies, self.dimension, self.initial_std, (center,), self.ceiling)
