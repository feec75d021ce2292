"""A curved valley."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, TaskFamily
from learnedopt.tasks.draws import Range, log_uniform_tensor
from learnedopt.tasks.functions import FunctionTask, check_dimension


@dataclass(frozen=True, eq=False)
class RosenbrockTask(FunctionTask):
    """One draw of :class:`Rosenbrock`; the batch is the steepness, ``(copies,)``."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        (steepness,) = batch
        theta = params["theta"]
        here, following = theta[:-1], theta[1:]
        return (steepness * (following - here.square()).square() + (1 - here).square()).sum()


@dataclass(frozen=True)
class Rosenbrock(TaskFamily):
    r"""Minimize :math:`\sum_{i<n} b(\theta_{i+1} - \theta_i^2)^2 + (1 - \theta_i)^2` from a random start.

    Rosenbrock 1960, *An automatic method for finding the greatest or least value of a function*, in its usual extension
    to n dimensions; b is log-uniform in ``steepnesses``, a number for each copy. The minimum, 0, is at θ = 1, along a
    valley whose walls are far steeper than its floor.

    Raises ``ValueError`` unless ``dimension`` is at least 2.

    >>> import torch
    >>> task = Rosenbrock().draw(torch.Generator().manual_seed(0), copies=3)
    >>> float(task.loss({"theta": torch.ones(2)}, (torch.tensor(100.0),)))
    0.0
    """

    dimension: int = 2
    steepnesses: Range = (100.0, 100.0)
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        check_dimension(self.dimension, least=2)

    def draw(self, generator: Generator, copies: int) -> RosenbrockTask:
        steepness = log_uniform_tensor(generator, self.steepnesses, (copies,))
        return RosenbrockTask(copies, self.dimension, self.initial_std, (steepness,))
