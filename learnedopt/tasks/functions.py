"""What the closed-form functions share: one vector of parameters, and the tensors that define the function."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator

from learnedopt.tasks.base import Batch, Params, Split, Task


@dataclass(frozen=True, eq=False)
class FunctionTask(Task):
    r"""A function of one vector ``theta``, which starts from :math:`\mathcal N(0, \mathtt{initial\_std}^2)`.

    The tensors that define each copy's function, ``problem``, are its batch, always the same one. There are no examples
    to hold out: every split is the function itself, and what can be held out is other draws of the family.
    """

    copies: int
    dimension: int
    initial_std: float
    problem: Batch = field(repr=False)

    def init(self, generator: Generator) -> Params:
        return {"theta": self.initial_std * torch.randn(self.copies, self.dimension, generator=generator)}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return self.problem


def check_dimension(dimension: int, least: int = 1) -> None:
    """Raise ``ValueError`` if there are fewer than ``least`` dimensions."""
    if dimension < least:
        raise ValueError(f"dimension must be at least {least}, got {dimension}")
