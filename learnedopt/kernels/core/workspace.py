"""Reused memory for the blocked backend: made once, at most 32 MiB in float32, whatever the model's size."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from learnedopt.kernels.core import blocks
from learnedopt.kernels.core.state import low_bytes

LIMIT = 2**23
"""Numbers in a workspace: 32 MiB in float32. Rules that need more rows get smaller blocks."""
BLOCKS = 4
"""Blocks of others that make one here: each takes some fifty calls of torch, which cost more than a full cache."""


@dataclass(frozen=True)
class Sizes:
    """The rows a program needs. Without an LSTM there is room for one layer of no units."""

    features: int
    outputs: int
    """Rows of the read-out."""
    scalars: int = 0
    """Rows for entries of the state that are one number per coordinate, and for what is computed from them."""
    extra: int = 0
    """Rows of the read-out's input besides the top layer."""
    hidden: int = 0
    """Units of a layer."""
    layers: int = 1

    @property
    def rows(self) -> int:
        layers = self.layers * (2 * self.hidden + 1) + self.features + 1
        others = self.extra + self.outputs + self.scalars + 3
        return layers + 7 * self.hidden + 2 * low_bytes(self.hidden) + others

    @property
    def block(self) -> int:
        """Coordinates to work on at once."""
        return max(1, min(BLOCKS * blocks.BLOCK, LIMIT // self.rows))


class Views:
    """A workspace for blocks of ``n`` coordinates; every array is ``(rows, n)`` and contiguous.

    ``inputs[l]`` is what the weights of layer ``l`` are multiplied with: features, or the layer below; hidden state;
    ones. ``top`` is the same for the read-out: the top layer, ``extra`` rows, ones. ``hidden[l]`` and ``outputs[l]``
    are the places in them for a layer's old and new hidden state.
    """

    def __init__(self, sizes: Sizes, buffer: Tensor, n: int) -> None:
        place = 0

        def take(count: int) -> Tensor:
            nonlocal place
            place += count
            return buffer[(place - count) * n : place * n].view(count, n)

        hidden, below = sizes.hidden, [sizes.features, *[sizes.hidden] * (sizes.layers - 1)]
        self.inputs = [take(size + hidden + 1) for size in below]
        self.top = take(hidden + sizes.extra + 1)
        self.features = self.inputs[0][: sizes.features]
        self.hidden = [x[-hidden - 1 : -1] for x in self.inputs]
        self.outputs = [x[:hidden] for x in (*self.inputs[1:], self.top)]
        self.gates = take(4 * hidden)
        self.sigmoids, self.tanhs = self.gates[: 3 * hidden], self.gates[3 * hidden :]
        self.input, self.forget, self.output = self.sigmoids.chunk(3)
        self.cell, self.scratch, self.spare = take(hidden), take(hidden), take(hidden)
        self.low, self.digits = take(low_bytes(hidden)), take(low_bytes(hidden))
        self.out, self.scalars = take(sizes.outputs), take(sizes.scalars)
        self.scale, self.param, self.grad = take(1), take(1), take(1)

    def make_ones(self) -> None:
        for x in (*self.inputs, self.top):
            x[-1].fill_(1.0)


class _Workspace(threading.local):
    """A buffer for each thread and dtype, and the views of it that have been used."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[Sizes, torch.dtype, int], Views] = {}
        self._last: Views | None = None

    def views(self, sizes: Sizes, dtype: torch.dtype, n: int) -> Views:
        """Views of memory that holds anything, but for the rows of ones."""
        views = self._views.get((sizes, dtype, n))
        if views is None:
            buffer = self._buffers.get(dtype)
            if buffer is None or buffer.numel() < sizes.rows * n:
                buffer = self._buffers[dtype] = torch.empty(sizes.rows * max(n, sizes.block), dtype=dtype)
                self._views.clear()
            if len(self._views) == 256:  # whole blocks are of one size, but what is left of tensors is of any
                self._views.clear()
            views = self._views[sizes, dtype, n] = Views(sizes, buffer, n)
        if views is not self._last:
            views.make_ones()
            self._last = views
        return views


WORKSPACE = _Workspace()
