"""What a rule is trained and judged on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Generator, Tensor

Params = dict[str, Tensor]
"""An optimizee's parameters by name."""
Batch = tuple[Tensor, ...]
"""What one evaluation of the loss reads besides the parameters."""
Split = Literal["train", "validation", "test"]


class Task(ABC):
    """``copies`` optimizees of one structure, side by side.

    Parameters and batches carry the copies on their first axis; :meth:`loss` is written for *one* copy, without that
    axis, and vectorized by ``torch.func.vmap``. Copies differ in initialization, in data order, and in whatever
    data defines them (the matrix of a quadratic, say), which then travels in the batch.

    Randomness comes only from the generator passed in: the same seed gives the same parameters and batches.
    """

    copies: int

    @abstractmethod
    def init(self, generator: Generator) -> Params:
        """Fresh parameters, each ``(copies, *shape)``."""

    @abstractmethod
    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        """A batch for every copy, each tensor ``(copies, ...)``."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The scalar loss of one copy; pure and differentiable in ``params``."""

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        """The share of one copy's examples that it classifies correctly, where the task is classification."""
        raise NotImplementedError(f"{type(self).__name__} is not a classification task")


class TaskFamily(ABC):
    """A distribution over task structures."""

    @abstractmethod
    def draw(self, generator: Generator, copies: int) -> Task:
        """One structure, ``copies`` times."""
