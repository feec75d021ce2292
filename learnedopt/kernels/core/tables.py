"""What a step's tensors are to Triton's kernels: a table of addresses on the device, and launches by dtype."""

from __future__ import annotations

import functools
import importlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels.core.base import Tensors
from learnedopt.kernels.core.state import LOW, SCALE

_READABLE = (torch.float32, torch.bfloat16, torch.float16)


class Field(IntEnum):
    """Columns of the table. Rows are the tensors'; what a tensor does not have is zero."""

    PARAM = 0
    GRAD = 1
    OWN_GRAD = 2
    SIZE = 3
    H = 4
    H_SCALE = 5
    C = 6
    C_LOW = 7
    C_SCALE = 8
    NUMBERS = 9  # and on: a program's entries of one number per coordinate, at most four


_WIDTH = Field.NUMBERS + 4


@dataclass(frozen=True)
class Launch:
    """The tensors of one dtype."""

    param: Any
    grad: Any
    own_grad: Any
    """``None`` where gradients are in the tensors' own coordinates."""
    chunks: Tensor
    """``(programs, 2)``: tensor and first coordinate."""
    lengths: Tensor
    """``(tensors,)``: how many chunks each has here."""


class Work:
    """The tensors of a step as the kernels take them.

    Args:
        numbers: The entries of the state that are one number per coordinate, in the order in which a kernel knows them.
        chunk: Coordinates of one program.
    """

    def __init__(self, numbers: Sequence[str], tensors: Tensors, chunk: int) -> None:
        self._params = tensors.params
        self._dense = [param.contiguous() for param in tensors.params]
        # Kept here: they must live until the kernel is launched.
        self._grads = [_readable(grad) for grad in tensors.grads]
        self._own_grads = None if tensors.own_grads is None else [_readable(grad) for grad in tensors.own_grads]
        fields = ("h", "h" + SCALE, "c", "c" + LOW, "c" + SCALE, *numbers)
        rows = []
        for index, (param, grad, state) in enumerate(zip(self._dense, self._grads, tensors.states)):
            own_grad = 0 if self._own_grads is None else self._own_grads[index].data_ptr()
            entries = [state[name].data_ptr() if name in state else 0 for name in fields]
            row = (param.data_ptr(), grad.data_ptr(), own_grad, param.numel(), *entries)
            rows.append((*row, *[0] * (_WIDTH - len(row))))
        stream = torch.cuda.current_stream(tensors.device).cuda_stream if tensors.device.type == "cuda" else 0
        self.table = _TABLES.on_device(tuple(rows), tensors.device, stream)
        own_grads: Sequence[Tensor | None] = self._own_grads or [None] * len(rows)
        dtypes = tuple(
            (param.dtype, grad.dtype, None if own is None else own.dtype)
            for param, grad, own in zip(self._dense, self._grads, own_grads)
        )
        self.launches = _launches(tuple(param.numel() for param in self._dense), dtypes, tensors.device, chunk)

    def write_back(self) -> None:
        """To parameters whose elements are not in order in memory, from copies that are."""
        for param, dense in zip(self._params, self._dense):
            if dense is not param:
                param.copy_(dense)


def triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def _readable(grad: Tensor) -> Tensor:
    return (grad if grad.dtype in _READABLE else grad.float()).contiguous()


@functools.lru_cache(maxsize=64)
def _launches(
    sizes: tuple[int, ...], dtypes: tuple[tuple[torch.dtype | None, ...], ...], device: torch.device, chunk: int
) -> list[Launch]:
    launches = []
    for together in dict.fromkeys(dtypes):
        counts = [-(-size // chunk) if own == together else 0 for size, own in zip(sizes, dtypes)]
        if not any(counts):
            continue
        tensor = torch.repeat_interleave(torch.tensor(counts))
        before = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        first = (torch.arange(len(tensor)) - before[tensor]) * chunk
        chunks = torch.stack([tensor, first], dim=1)
        param, grad, own_grad = (None if dtype is None else triton_dtype(dtype) for dtype in together)
        launches.append(Launch(param, grad, own_grad, chunks.to(device), torch.tensor(counts).to(device)))
    return launches


class _Tables:
    """Tables of addresses, the last few that were used, and for ever those that a CUDA graph was captured with."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def on_device(self, rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
        key = rows, device, stream
        if key not in self._kept:
            host = torch.tensor(rows, dtype=torch.int64)
            if device.type == "cuda":
                host = host.pin_memory()  # from which the device copies while the host goes on
            self._kept[key] = host, host.to(device, non_blocking=True)
            if len(self._kept) > 64:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(self._kept[key])
        return self._kept[key][1]


_TABLES = _Tables()
