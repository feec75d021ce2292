"""Tasks of one's own, from three functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily


@dataclass(frozen=True)
class FromFunctions(TaskFamily):
    """One problem, written as three functions that know nothing of copies.

    Copies differ in what ``init`` and ``sample`` draw. All splits are alike: fresh batches from ``sample``.

    Args:
        init: Fresh parameters by name, drawn from a generator.
        sample: A batch, a tuple of tensors, drawn from a generator.
        loss: The scalar loss of parameters on a batch; pure, and such that ``torch.func.vmap`` can vectorize it.

    >>> def init(generator): return {"w": torch.randn(3, generator=generator)}
    >>> def sample(generator): return (torch.randn(16, 3, generator=generator),)
    >>> def loss(params, batch): return (batch[0] @ params["w"]).square().mean()
    >>> task = FromFunctions(init, sample, loss).draw(torch.Generator(), copies=2)
    >>> task.init(torch.Generator())["w"].shape
    torch.Size([2, 3])
    """

    init: Callable[[Generator], Params]
    sample: Callable[[Generator], Batch]
    loss: Callable[[Params, Batch], Tensor]

    def draw(self, generator: Generator, copies: int) -> Task:
        return _FromFunctions(copies, self)


@dataclass(frozen=True, eq=False)
class _FromFunctions(Task):
    copies: int
    functions: FromFunctions

    def init(self, generator: Generator) -> Params:
        drawn = [self.functions.init(generator) for _ in range(self.copies)]
        return {name: torch.stack([params[name] for params in drawn]) for name in drawn[0]}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        drawn = [self.functions.sample(generator) for _ in range(self.copies)]
        return tuple(torch.stack(items) for items in zip(*drawn))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.functions.loss(params, batch)

    def __repr__(self) -> str:
        return f"FromFunctions({self.functions.loss.__module__}.{self.functions.loss.__qualname__})"
