"""Quadratics whose curvatures spread over orders of magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, log_integer, log_uniform
from learnedopt.tasks.functions import FunctionTask


@dataclass(frozen=True, eq=False)
class IllConditionedTask(FunctionTask):
    """One draw of :class:`IllConditioned`; the batch is Λ^½ Qᵀ ``(copies, n, n)`` and the minimum ``(copies, n)``."""

    condition: float

    def loss(self, params: Params, batch: Batch) -> Tensor:
        root, minimum = batch
        return 0.5 * (root @ (params["theta"] - minimum)).square().sum()


@dataclass(frozen=True)
class IllConditioned(TaskFamily):
    r"""Minimize :math:`\frac 12 (\theta - \theta^*)^\top Q \Lambda Q^\top (\theta - \theta^*)`.

    Q is a uniformly random rotation. The curvatures Λ lie between 1/κ and 1, both of which occur, the others
    log-uniformly between them; the condition number κ is log-uniform in ``conditions``. The minimum is standard normal.
    The matrix is kept as :math:`\Lambda^{1/2} Q^\top`: multiplied out, its least curvatures would drown in the rounding
    of single precision. Every copy has a rotation, curvatures and a minimum of its own; κ and n are the structure's.

    Raises ``ValueError`` unless there are at least two dimensions and κ is at least 1.

    >>> task = IllConditioned(conditions=(100.0, 100.0)).draw(torch.Generator().manual_seed(0), copies=2)
    >>> curvatures = torch.linalg.svdvals(task.problem[0]).square()
    >>> (curvatures[:, 0] / curvatures[:, -1]).round()
    tensor([100., 100.])
    """

    dimensions: IntRange = (5, 50)
    conditions: Range = (1.0, 1e6)
    initial_std: float = 0.01

    def __post_init__(self) -> None:
        if not (self.dimensions[0] >= 2 and self.conditions[0] >= 1):
            raise ValueError(
                f"dimensions must be at least 2 and conditions at least 1, got {self.dimensions} and {self.conditions}"
            )

    def draw(self, generator: Generator, copies: int) -> IllConditionedTask:
        dimension, condition = log_integer(generator, self.dimensions), log_uniform(generator, self.conditions)
        exponents = torch.rand(copies, dimension, generator=generator)
        exponents[:, 0], exponents[:, 1] = 0.0, 1.0
        root = rotation(generator, copies, dimension) * (condition ** (-0.5 * exponents))[:, :, None]
        minimum = torch.randn(copies, dimension, generator=generator)
        return IllConditionedTask(copies, dimension, self.initial_std, (root, minimum), condition)


def rotation(generator: Generator, copies: int, dimension: int) -> Tensor:
    """Orthogonal matrices ``(copies, dimension, dimension)``, each equally likely (the Haar measure).

    Q of the QR decomposition of a Gaussian matrix, with the signs that make it unique (Mezzadri 2007, *How to generate
    random matrices from the classical compact groups*, arXiv:math-ph/0609050).
    """
    q, r = torch.linalg.qr(torch.randn(copies, dimension, dimension, generator=generator, dtype=torch.float64))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).float()
