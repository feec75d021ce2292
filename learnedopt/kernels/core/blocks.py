"""How tensors of any sizes and layouts are cut and laid side by side for what works on flat vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

BLOCK = 8192
"""Coordinates worked on at once: enough to hide the cost of a call, few enough to stay in a core's cache."""


def bundles(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of those to work on together: several of at most ``limit`` in all, or one of more than half of it.

    >>> list(bundles([4000, 10000, 3000, 2000], 8192))
    [[1], [0, 2], [3]]
    """
    bundle: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if 2 * size > limit:
            yield [index]
            continue
        if total + size > limit:
            yield bundle
            bundle, total = [], 0
        bundle.append(index)
        total += size
    if bundle:
        yield bundle


def pieces(tensors: Sequence[Tensor], limit: int, start: int = 0) -> Iterator[tuple[Sequence[Tensor], int]]:
    """Views of at most ``limit`` coordinates of tensors of one shape, and where each begins.

    In row-major order, whatever the strides.

    >>> import torch
    >>> [(param.shape, start) for (param, _), start in pieces([torch.ones(20000), torch.ones(20000)], 8192)]
    [(torch.Size([8192]), 0), (torch.Size([8192]), 8192), (torch.Size([3616]), 16384)]
    """
    shape, size = tensors[0].shape, tensors[0].numel()
    if size <= limit:
        yield tensors, start
    elif all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for first in range(0, size, limit):
            yield [tensor[first : first + limit] for tensor in flat], start + first
    else:
        row = size // shape[0]
        rows = max(1, limit // row)
        for first in range(0, shape[0], rows):
            block = slice(first, first + rows) if row <= limit else first
            yield from pieces([tensor[block] for tensor in tensors], limit, start + first * row)
