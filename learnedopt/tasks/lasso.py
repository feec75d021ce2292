"""Sparse linear regression."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, TaskFamily
from learnedopt.tasks.functions import FunctionTask, check_dimension


@dataclass(frozen=True, eq=False)
class LassoTask(FunctionTask):
    """One draw of :class:`Lasso`; the batch is A ``(copies, equations, dimension)`` and b ``(copies, equations)``."""

    penalty: float

    def loss(self, params: Params, batch: Batch) -> Tensor:
        matrix, target = batch
        theta = params["theta"]
        return 0.5 * (matrix @ theta - target).square().sum() + self.penalty * theta.abs().sum()


@dataclass(frozen=True)
class Lasso(TaskFamily):
    r"""Minimize :math:`\frac 12 \|A\theta - b\|^2 + \lambda \|\theta\|_1`, A and b standard normal.

    Not smooth at zero, where the solution has many of its coordinates. Five equations in ten unknowns with
    λ = 0.005 are the smaller problem of Chen et al. 2021, *Learning to Optimize: A Primer and A Benchmark*
    (arXiv:2103.12828; the larger has 25 equations in 50 unknowns); parameters start near zero as in their
    code. Both are published there as fixed files, here every copy has its own.

    Raises ``ValueError`` unless ``equations`` and ``dimension`` are positive and ``penalty`` is not negative.

    >>> task = Lasso().draw(torch.Generator().manual_seed(0), copies=2)
    >>> [tuple(tensor.shape) for tensor in task.problem]
    [(2, 5, 10), (2, 5)]
    """

    equations: int = 5
    dimension: int = 10
    penalty: float = 0.005
    initial_std: float = 0.01

    def __post_init__(self) -> None:
        check_dimension(self.dimension)
        if self.equations < 1:
            raise ValueError(f"equations must be at least 1, got {self.equations}")
        if not self.penalty >= 0:
            raise ValueError(f"penalty must not be negative, got {self.penalty}")

    def draw(self, generator: Generator, copies: int) -> LassoTask:
        matrix = torch.randn(copies, self.equations, self.dimension, generator=generator)
        target = torch.randn(copies, self.equations, generator=generator)
        return LassoTask(copies, self.dimension, self.initial_std, (matrix, target), self.penalty)
