"""What the tasks of the benchmark share: fixed structure, rows of fixed data, plain functions for the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.evaluation.tasks.sources import Rows
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import minibatch

Init = Callable[[Generator, int], Params]
"""Fresh parameters of so many copies."""
Augment = Callable[[Generator, Batch], Batch]
"""What randomness a batch brings besides its rows: noise, negative examples."""


@dataclass(frozen=True, eq=False)
class RowsTask(Task):
    """A network on minibatches of rows, each copy's drawn with replacement; copies differ in start and order only.

    ``objective`` is the loss of one copy. ``augment`` adds to a batch what its loss draws at random, so that the loss
    itself is pure. ``scores`` gives class scores where there are classes: they make the accuracy.
    """

    copies: int
    rows: Rows = field(repr=False)
    batch_size: int
    initial: Init = field(repr=False)
    objective: Callable[[Params, Batch], Tensor] = field(repr=False)
    augment: Augment | None = field(default=None, repr=False)
    scores: Callable[[Params, Tensor], Tensor] | None = field(default=None, repr=False)

    def init(self, generator: Generator) -> Params:
        return self.initial(generator, self.copies)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        batch = minibatch(generator, self.copies, self.batch_size, *self.rows[split])
        return batch if self.augment is None else self.augment(generator, batch)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.objective(params, batch)

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        if self.scores is None:
            return super().accuracy(params, batch)
        return (self.scores(params, batch[0]).argmax(-1) == batch[1]).float().mean()


@dataclass(frozen=True)
class Always(TaskFamily):
    """A family of one structure: ``make(copies)``, whatever the generator."""

    make: Callable[[int], Task]

    def draw(self, generator: Generator, copies: int) -> Task:
        return self.make(copies)


def classifier(
    copies: int, rows: Rows, batch_size: int, initial: Init, scores: Callable[[Params, Tensor], Tensor]
) -> RowsTask:
    """Mean cross-entropy of ``scores(params, inputs)``, classes last, on rows of inputs and classes."""

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(scores(params, x), y)

    return RowsTask(copies, rows, batch_size, initial, objective, scores=scores)
