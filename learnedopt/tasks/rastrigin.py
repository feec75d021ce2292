"""A bowl with many dents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, TaskFamily
from learnedopt.tasks.functions import FunctionTask, check_dimension


@dataclass(frozen=True, eq=False)
class RastriginTask(FunctionTask):
    """One draw of :class:`Rastrigin`; the batch is A ``(copies, n, n)``, b and c ``(copies, n)``."""

    alpha: float

    def loss(self, params: Params, batch: Batch) -> Tensor:
        matrix, target, depth = batch
        theta = params["theta"]
        bowl = 0.5 * (matrix @ theta - target).square().sum()
        return bowl - self.alpha * (depth * torch.cos(2 * math.pi * theta)).sum() + self.alpha * self.dimension


@dataclass(frozen=True)
class Rastrigin(TaskFamily):
    r"""Minimize :math:`\frac 12 \|A\theta - b\|^2 - \alpha\, c^\top \cos(2\pi\theta) + \alpha n`.

    A, b, c and the start are standard normal: the variant that learned optimizers are compared on (Cao et al. 2019,
    *Learning to Optimize in Swarms*, arXiv:1911.03787; Chen et al. 2021, arXiv:2103.12828). The classical
    function is A = I, b = 0, c = 1 up to the factor of its square. Local minima lie about one apart in each coordinate;
    as c may exceed one, the least value may be negative.

    Raises ``ValueError`` unless ``dimension`` is positive.

    >>> task = Rastrigin(dimension=2).draw(torch.Generator().manual_seed(0), copies=1)
    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> float(task.loss({"theta": zero}, (torch.eye(2), zero, one)))
    0.0
    """

    dimension: int = 10
    alpha: float = 10.0
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        check_dimension(self.dimension)

    def draw(self, generator: Generator, copies: int) -> RastriginTask:
        matrix = torch.randn(copies, self.dimension, self.dimension, generator=generator)
        target, depth = torch.randn(2, copies, self.dimension, generator=generator)
        return RastriginTask(copies, self.dimension, self.initial_std, (matrix, target, depth), self.alpha)
