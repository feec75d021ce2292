"""Multilayer perceptrons of any shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Generator

from learnedopt.data import ImageData, digits
from learnedopt.tasks.base import TaskFamily
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, integer, log_integer, log_uniform
from learnedopt.tasks.layers import ACTIVATIONS
from learnedopt.tasks.mlp import MLP


@dataclass(frozen=True)
class RandomMLP(TaskFamily):
    """Image classifiers whose depth, width of each layer, activation, initial scale and batch size are drawn.

    Initial weights have variance ``gain² / fan-in``, biases are zero. :class:`MLPClassification` draws from lists of
    given networks instead.

    >>> import torch
    >>> family = RandomMLP(depths=(2, 2), widths=(8, 16))
    >>> family.draw(torch.Generator().manual_seed(0), copies=1)
    MLP(digits, hidden=..., ..., batch_size=...)
    """

    data: ImageData = field(default_factory=digits)
    depths: IntRange = (1, 4)
    """Hidden layers."""
    widths: IntRange = (8, 64)
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    gains: Range = (0.5, 2.0)
    batch_sizes: IntRange = (8, 128)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)

    def draw(self, generator: Generator, copies: int) -> MLP:
        depth = integer(generator, self.depths)
        return MLP(
            copies=copies,
            data=self.data,
            hidden=tuple(log_integer(generator, self.widths) for _ in range(depth)),
            activation=choice(generator, self.activations),
            batch_size=log_integer(generator, self.batch_sizes),
            gain=log_uniform(generator, self.gains),
        )
