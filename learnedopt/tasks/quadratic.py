"""Random least-squares problems, the first experiment of Andrychowicz et al. 2016."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily


@dataclass(frozen=True)
class Quadratics(TaskFamily):
    r"""Minimize :math:`\|W\theta - y\|^2`, with W and y drawn anew for every copy.

    ``entries="gaussian"`` draws W and y standard normal, as in the paper (arXiv:1606.04474, section 3.1);
    ``"uniform"`` draws them from [0, 1), as in the authors' code. Parameters start from
    :math:`\mathcal N(0, \mathtt{initial\_std}^2)`. The authors' code also averages the loss over its batch of
    problems before differentiating, so that gradients shrink as more problems are trained on at once; here each
    problem has its own loss.
    """

    dimension: int = 10
    entries: Literal["gaussian", "uniform"] = "gaussian"
    initial_std: float = 0.01

    def __post_init__(self) -> None:
        if self.entries not in ("gaussian", "uniform"):
            raise ValueError(f"entries must be 'gaussian' or 'uniform', got {self.entries!r}")

    def draw(self, generator: Generator, copies: int) -> Task:
        draw = torch.randn if self.entries == "gaussian" else torch.rand
        matrix = draw(copies, self.dimension, self.dimension, generator=generator)
        target = draw(copies, self.dimension, generator=generator)
        return _Quadratic(copies, matrix, target, self.initial_std)


@dataclass(frozen=True, eq=False)
class _Quadratic(Task):
    copies: int
    matrix: Tensor
    target: Tensor
    initial_std: float

    def init(self, generator: Generator) -> Params:
        shape = (self.copies, self.target.shape[-1])
        return {"theta": self.initial_std * torch.randn(shape, generator=generator)}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return self.matrix, self.target

    def loss(self, params: Params, batch: Batch) -> Tensor:
        matrix, target = batch
        return (matrix @ params["theta"] - target).square().sum()

    def __repr__(self) -> str:
        return f"Quadratic(dimension={self.target.shape[-1]})"
