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


def pieces(param: Tensor, grad: Tensor, limit: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Views of at most ``limit`` coordinates, and where each begins: in row-major order, whatever the strides.

    >>> import torch
    >>> [(param.shape, start) for param, _, start in pieces(torch.ones(20000), torch.ones(20000), 8192)]
    [(torch.Size([8192]), 0), (torch.Size([8192]), 8192), (torch.Size([3616]), 16384)]
    """
    size = param.numel()
    if size <= limit:
        yield param, grad, start
    elif param.is_contiguous() and grad.is_contiguous():
        param, grad = param.view(-1), grad.view(-1)
        for first in range(0, size, limit):
            yield param[first : first + limit], grad[first : first + limit], start + first
    else:
        row = size // len(param)
        rows = max(1, limit // row)
        for first in range(0, len(param), rows):
            block = slice(first, first + rows) if row <= limit else first
            yield from pieces(param[block], grad[block], limit, start + first * row)
