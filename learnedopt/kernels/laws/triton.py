""":class:`~learnedopt.rules.LawsRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.rules import LawsRule
from learnedopt.rules.laws import Mean, Row

_FROM_OFFSET, _FROM_DIRECTION = tl.constexpr(int(Row.FROM_OFFSET)), tl.constexpr(int(Row.FROM_DIRECTION))
_STEP, _KEPT = tl.constexpr(int(Row.STEP)), tl.constexpr(int(Row.KEPT))
_MEANS = tl.constexpr(len(Mean))
_SLOPE_WAY, _SLOPE_SQUARE = tl.constexpr(int(Mean.SLOPE_WAY)), tl.constexpr(int(Mean.SLOPE_SQUARE))
_WAY_SQUARE, _PARAM_SQUARE = tl.constexpr(int(Mean.WAY_SQUARE)), tl.constexpr(int(Mean.PARAM_SQUARE))


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    MAXIMIZE: tl.constexpr, LR_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step."""
    tensor, first, size = core.place(tensors, chunks)
    size = core.unless_skipped(size, skip_at, SKIP)
    lr = core.rate(lr_at, lr_value, LR_IN_MEMORY)
    params = core.address(tensors, tensor, core.PARAM_FIELD, PARAM)
    grads = core.address(tensors, tensor, core.GRAD_FIELD, GRAD)
    offsets = core.numbers(tensors, tensor, 0)
    from_offset = core.of_tensor(statistics, _FROM_OFFSET, num_tensors, tensor)
    from_direction = core.of_tensor(statistics, _FROM_DIRECTION, num_tensors, tensor)
    step = core.of_tensor(statistics, _STEP, num_tensors, tensor)
    kept = core.of_tensor(statistics, _KEPT, num_tensors, tensor)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        direction, offset = core.load_grad(grads, at, size, MAXIMIZE), core.load(offsets, at, size)
        tl.store(offsets + at, kept * (offset - step * direction), mask=at < size)
        delta = from_offset * offset - from_direction * direction
        core.move(params, at, size, core.load(params, at, size), delta, lr, weight_decay, PARAM)


@triton.jit
def sums_kernel(
    tensors, chunks, corrections, num_tensors, sums, way_limit,
    MAXIMIZE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, OWN_GRAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the rule takes the means of, added up over each chunk: ``sums (chunks, means)``."""
    tensor, first, size = core.place(tensors, chunks)
    at = first + tl.arange(0, CHUNK)
    param = core.load(core.address(tensors, tensor, core.PARAM_FIELD, PARAM), at, size)
    if OWN_GRAD is not None:
        slope = core.load_grad(core.address(tensors, tensor, core.OWN_GRAD_FIELD, OWN_GRAD), at, size, MAXIMIZE)
    else:
        slope = core.load_grad(core.address(tensors, tensor, core.GRAD_FIELD, GRAD), at, size, MAXIMIZE)
    slope = core.within(slope, way_limit)
    way = core.within(core.load(core.numbers(tensors, tensor, 1), at, size) - param, way_limit)
    to = sums + _MEANS * tl.program_id(0)
    tl.store(to + _SLOPE_WAY, tl.sum(slope * way, axis=0))
    tl.store(to + _SLOPE_SQUARE, tl.sum(slope * slope, axis=0))
    tl.store(to + _WAY_SQUARE, tl.sum(way * way, axis=0))
    tl.store(to + _PARAM_SQUARE, tl.sum(param * param, axis=0))


class Program(triton_backend.Program):
    step_kernel = step_kernel
    sums_kernel = sums_kernel
    entries = ("offset", "origin")
    num_means = len(Mean)

    def __init__(self, rule: LawsRule) -> None:
        super().__init__({}, of_sums={"way_limit": rule.way_limit})
