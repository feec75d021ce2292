"""The processes that meta-train together, or the one that does so alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process's place among those of ``torch.distributed``'s default group; alone if there is none.

    Whatever is gathered comes back in an order that does not depend on how many processes share the work: item
    ``i`` of a list of all items belongs to rank ``i % size``, at its place ``i // size``.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    def mine(self, count: int) -> range:
        """Which of ``count`` items are this rank's."""
        return range(self.rank, count, self.size)

    def gather(self, rows: Tensor) -> Tensor:
        """All rows in their global order, on every rank: ``(count / size, ...)`` to ``(count, ...)``."""
        if self.size == 1:
            return rows
        parts = [rows.new_empty(rows.shape) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def collect(self, items: list[Any]) -> list[Any]:
        """All items in their global order, on every rank; any picklable things, and any number of them."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        longest = max(map(len, parts))
        return [part[place] for place in range(longest) for part in parts if place < len(part)]


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` has started with this one, if it did; gives the device of this one.

    On CUDA each process of a machine takes a device of its own, and they talk through NCCL; elsewhere through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
