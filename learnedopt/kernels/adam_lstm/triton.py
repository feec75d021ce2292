""":class:`~learnedopt.rules.AdamLSTMRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.rules import AdamLSTMRule
from learnedopt.rules.adam_lstm import Mean, Row

_FEATURES, _SHARED = tl.constexpr(int(Row.FEATURES)), tl.constexpr(len(Row) - Row.FEATURES)
_FAST, _SLOW = tl.constexpr(int(Row.FAST_CORRECTION)), tl.constexpr(int(Row.SLOW_CORRECTION))
_SQUARE = tl.constexpr(int(Row.SQUARE_CORRECTION))
_MEANS = tl.constexpr(len(Mean))
_PARAM_SQUARE, _FAST_GRAD = tl.constexpr(int(Mean.PARAM_SQUARE)), tl.constexpr(int(Mean.FAST_GRAD))
_SLOW_SQUARE = tl.constexpr(int(Mean.SLOW_SQUARE))


@triton.jit
def _directions(where, grad, statistics, averaging):
    """New moments, and both momenta and the gradient over the running RMS."""
    tensors, tensor, num_tensors, at, size = where
    fast_decay, slow_decay, square_decay, eps = averaging
    fast = core.load(core.numbers(tensors, tensor, 0), at, size)
    slow = core.load(core.numbers(tensors, tensor, 1), at, size)
    square = core.load(core.numbers(tensors, tensor, 2), at, size)
    grad = core.within(grad, 9.223371873002223e18)  # half the root of the largest float32
    fast = grad + fast_decay * (fast - grad)
    slow = grad + slow_decay * (slow - grad)
    square = grad * grad + square_decay * (square - grad * grad)
    fast_correction = core.of_tensor(statistics, _FAST, num_tensors, tensor)
    slow_correction = core.of_tensor(statistics, _SLOW, num_tensors, tensor)
    square_correction = core.of_tensor(statistics, _SQUARE, num_tensors, tensor)
    rms = tl.sqrt(core.at_least(square * square_correction, 1.1754943508222875e-38)) + eps
    return fast, slow, square, fast * fast_correction / rms, slow * slow_correction / rms, grad / rms


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    features, recurrent, below, biases, readout,
    fast_decay, slow_decay, square_decay, eps, nominal_step, log_step_gain, log_step_bound, mix_bound,
    MAXIMIZE: tl.constexpr, LR_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    LAYERS: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step. ``readout`` is ``(3, PADDED + 1)``."""
    tensor, first, size = core.place(tensors, chunks)
    size = core.unless_skipped(size, skip_at, SKIP)
    weights = (features, recurrent, below, biases)
    lr = core.rate(lr_at, lr_value, LR_IN_MEMORY)
    params = core.address(tensors, tensor, core.PARAM_FIELD, PARAM)
    grads = core.address(tensors, tensor, core.GRAD_FIELD, GRAD)
    averaging = (fast_decay, slow_decay, square_decay, eps)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        where = (tensors, tensor, num_tensors, at, size)
        here = at < size
        grad = core.load_grad(grads, at, size, MAXIMIZE)
        param = core.load(params, at, size)
        fast, slow, square, a, b, g = _directions(where, grad, statistics, averaging)
        tl.store(core.numbers(tensors, tensor, 0) + at, fast, mask=here)
        tl.store(core.numbers(tensors, tensor, 1) + at, slow, mask=here)
        tl.store(core.numbers(tensors, tensor, 2) + at, square, mask=here)
        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        own = (a, b, g, tl.abs(a), tl.abs(b))
        top = core.lstm(
            where, own, top, statistics, weights, _FEATURES, _SHARED, False, STATE, LAYERS, UNITS, PADDED, BLOCK
        )
        row: tl.constexpr = PADDED + 1
        out0 = core.of_units(readout, readout + PADDED, top, PADDED, LAYERS)
        out1 = core.of_units(readout + row, readout + row + PADDED, top, PADDED, LAYERS)
        out2 = core.of_units(readout + 2 * row, readout + 2 * row + PADDED, top, PADDED, LAYERS)
        log_step = log_step_bound * core.tanh(out0 * (log_step_gain / log_step_bound))
        direction = (1.0 + core.bounded(out1, mix_bound)) * a + core.bounded(out2, mix_bound) * b
        delta = -nominal_step * tl.exp(log_step) * direction
        core.move(params, at, size, param, delta, lr, weight_decay, PARAM)


@triton.jit
def sums_kernel(
    tensors, chunks, corrections, num_tensors, sums, fast_decay, slow_decay, square_decay, eps,
    MAXIMIZE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, OWN_GRAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the rule takes the means of, added up over each chunk: ``sums (chunks, means)``."""
    tensor, first, size = core.place(tensors, chunks)
    at = first + tl.arange(0, CHUNK)
    where, averaging = (tensors, tensor, num_tensors, at, size), (fast_decay, slow_decay, square_decay, eps)
    param = core.load(core.address(tensors, tensor, core.PARAM_FIELD, PARAM), at, size)
    grad = core.load_grad(core.address(tensors, tensor, core.GRAD_FIELD, GRAD), at, size, MAXIMIZE)
    _, _, _, a, b, g = _directions(where, grad, corrections, averaging)
    to = sums + _MEANS * tl.program_id(0)
    tl.store(to + _PARAM_SQUARE, tl.sum(param * param, axis=0))
    tl.store(to + _FAST_GRAD, tl.sum(a * g, axis=0))
    tl.store(to + _SLOW_SQUARE, tl.sum(b * b, axis=0))


class Program(triton_backend.Program):
    step_kernel = step_kernel
    sums_kernel = sums_kernel
    entries = ("fast", "slow", "square")
    num_means = len(Mean)

    def __init__(self, rule: AdamLSTMRule) -> None:
        steps = ("nominal_step", "log_step_gain", "log_step_bound", "mix_bound")
        moments = {name: getattr(rule.config, name) for name in ("fast_decay", "slow_decay", "square_decay", "eps")}
        arguments = {
            **triton_backend.lstm_arguments(rule.lstm),
            "readout": triton_backend.readout(rule.readout.weight, None, rule.readout.bias),
            **moments,
            **{name: getattr(rule.config, name) for name in steps},
        }
        super().__init__(arguments, rule.lstm.num_layers, moments)

    @classmethod
    def refusal(cls, rule):
        return triton_backend.too_large(rule.lstm)
