"""Completion of a low-rank matrix from a few of its entries at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, choice, integer, log_integer, log_uniform, minibatch


@dataclass(frozen=True, eq=False)
class MatrixFactorizationTask(Task):
    """Mean squared error of ``rows @ columns.T`` on random entries of a noisy matrix of lower rank.

    A batch names its entries by one-hot rows and columns, so that most parameters get no gradient from it, as with
    embeddings. Each copy has a matrix of its own; the entries of the three splits are disjoint.
    """

    copies: int
    shape: tuple[int, int]
    rank: int
    gain: float
    batch_size: int
    matrix: Tensor = field(repr=False)
    entries: dict[str, Tensor] = field(repr=False)

    def init(self, generator: Generator) -> Params:
        return {
            name: self.gain * torch.randn(self.copies, count, self.rank, generator=generator)
            for name, count in zip(("rows", "columns"), self.shape)
        }

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        (entries,) = minibatch(generator, self.copies, self.batch_size, self.entries[split])
        rows, columns = entries // self.shape[1], entries % self.shape[1]
        return torch.eye(self.shape[0])[rows], torch.eye(self.shape[1])[columns], self.matrix.gather(1, entries)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        rows, columns, y = batch
        return F.mse_loss(((rows @ params["rows"]) * (columns @ params["columns"])).sum(-1), y)


@dataclass(frozen=True)
class MatrixFactorization(TaskFamily):
    """Matrices of random size and rank; the factors have at least that rank.

    >>> task = MatrixFactorization().draw(torch.Generator().manual_seed(0), copies=2)
    >>> sum(map(len, task.entries.values())) == task.shape[0] * task.shape[1]
    True
    """

    sizes: IntRange = (16, 100)
    ranks: IntRange = (2, 6)
    extra_ranks: IntRange = (0, 4)
    noises: tuple[float, ...] = (0.0, 0.1)
    gains: Range = (0.1, 0.6)
    batch_sizes: IntRange = (8, 64)

    def draw(self, generator: Generator, copies: int) -> MatrixFactorizationTask:
        n, m = log_integer(generator, self.sizes), log_integer(generator, self.sizes)
        rank = integer(generator, self.ranks)
        left = torch.randn(copies, n, rank, generator=generator)
        right = torch.randn(copies, rank, m, generator=generator)
        noise = choice(generator, self.noises) * torch.randn(copies, n, m, generator=generator)
        tenth = n * m // 10
        parts = torch.randperm(n * m, generator=generator).split([n * m - 2 * tenth, tenth, tenth])
        return MatrixFactorizationTask(
            copies=copies,
            shape=(n, m),
            rank=rank + integer(generator, self.extra_ranks),
            gain=log_uniform(generator, self.gains),
            batch_size=log_integer(generator, self.batch_sizes),
            matrix=(left @ right / rank**0.5 + noise).flatten(1),
            entries=dict(zip(("train", "validation", "test"), parts)),
        )
