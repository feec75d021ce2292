""":class:`~learnedopt.rules.NormalizedGradientRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.rules import NormalizedGradientRule
from learnedopt.rules.normalized import Mean, Row

_CORRECTION, _FLOOR = tl.constexpr(int(Row.CORRECTION)), tl.constexpr(int(Row.FLOOR))


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    square_decay, square_rest, eps, relative_eps,
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
    squares = core.numbers(tensors, tensor, 0)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        grad = core.in_range(core.load_grad(grads, at, size, MAXIMIZE))
        floor = core.of_tensor(statistics, _FLOOR, num_tensors, tensor)
        least = core.at_least(grad * grad + floor, 1.1754943508222875e-38)
        grad = tl.where(relative_eps > 0.0, grad * (grad * grad / least), grad)
        now = grad * grad + floor
        square = square_decay * core.load(squares, at, size) + square_rest * now
        tl.store(squares + at, square, mask=at < size)
        mean = square * core.of_tensor(statistics, _CORRECTION, num_tensors, tensor)
        delta = -grad / (core.root(mean) + eps)
        core.move(params, at, size, core.load(params, at, size), delta, lr, weight_decay, PARAM)


@triton.jit
def sums_kernel(
    tensors, chunks, corrections, num_tensors, sums,
    MAXIMIZE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, OWN_GRAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Squared gradients, added up over each chunk: ``sums (chunks, 1)``."""
    tensor, first, size = core.place(tensors, chunks)
    at = first + tl.arange(0, CHUNK)
    grad = core.load_grad(core.address(tensors, tensor, core.GRAD_FIELD, GRAD), at, size, MAXIMIZE)
    grad = core.in_range(grad)
    tl.store(sums + tl.program_id(0), tl.sum(grad * grad, axis=0))


class Program(triton_backend.Program):
    step_kernel = step_kernel
    sums_kernel = sums_kernel
    entries = ("square",)
    num_means = len(Mean)

    def __init__(self, rule: NormalizedGradientRule) -> None:
        decay = rule.config.square_decay
        eps = {name: getattr(rule.config, name) for name in ("eps", "relative_eps")}
        super().__init__({"square_decay": decay, "square_rest": 1.0 - decay, **eps})
