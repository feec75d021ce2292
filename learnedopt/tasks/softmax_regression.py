"""Linear classification of images."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Generator

from learnedopt.data import ImageData, digits
from learnedopt.tasks.base import TaskFamily
from learnedopt.tasks.draws import IntRange, Range, log_integer, log_uniform
from learnedopt.tasks.mlp import MLP


@dataclass(frozen=True)
class SoftmaxRegression(TaskFamily):
    """Cross entropy of a linear map of the pixels: an :class:`MLP` without hidden layers, a convex problem.

    :class:`Logistic` is the same model on synthetic, badly scaled features.

    >>> import torch
    >>> task = SoftmaxRegression().draw(torch.Generator().manual_seed(0), copies=2)
    >>> {name: tuple(value.shape) for name, value in task.init(torch.Generator()).items()}
    {'0.weight': (2, 64, 10), '0.bias': (2, 10)}
    """

    data: ImageData = field(default_factory=digits)
    gains: Range = (0.01, 1.0)
    batch_sizes: IntRange = (8, 128)

    def draw(self, generator: Generator, copies: int) -> MLP:
        return MLP(
            copies=copies,
            data=self.data,
            hidden=(),
            activation="relu",  # of hidden layers, of which there are none
            batch_size=log_integer(generator, self.batch_sizes),
            gain=log_uniform(generator, self.gains),
        )
