""":class:`~learnedopt.rules.ScheduleFreeRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.kernels.schedule_free.modulators import unknown_modulator
from learnedopt.rules import ScheduleFreeRule
from learnedopt.rules.schedule_free import Mean, Row

_MOMENTUM, _SQUARE = tl.constexpr(int(Row.MOMENTUM_CORRECTION)), tl.constexpr(int(Row.SQUARE_CORRECTION))
_AVERAGING, _PER_OFFSET = tl.constexpr(int(Row.AVERAGING)), tl.constexpr(int(Row.PER_OFFSET))
_FEATURES, _SHARED = tl.constexpr(int(Row.FEATURES)), tl.constexpr(len(Row) - Row.FEATURES)
_SEEN = tl.constexpr(4 + len(Row) - Row.FEATURES)
_MEANS = tl.constexpr(len(Mean))
_PARAM_SQUARE, _A_G = tl.constexpr(int(Mean.PARAM_SQUARE)), tl.constexpr(int(Mean.A_G))
_A_SQUARE, _OFFSET_SQUARE = tl.constexpr(int(Mean.A_SQUARE)), tl.constexpr(int(Mean.OFFSET_SQUARE))
_OFFSET_A, _SLOPE_WAY = tl.constexpr(int(Mean.OFFSET_A)), tl.constexpr(int(Mean.SLOPE_WAY))
_SLOPE_SQUARE, _WAY_SQUARE = tl.constexpr(int(Mean.SLOPE_SQUARE)), tl.constexpr(int(Mean.WAY_SQUARE))


@triton.jit
def _output(index: tl.constexpr, readout, top, own, statistics, where, PADDED: tl.constexpr, LAYERS: tl.constexpr):
    """What units and features contribute to an output."""
    _, tensor, num_tensors, _, _ = where
    row = readout + index * (PADDED + _SEEN + 1)
    out = core.of_units(row, row + PADDED + _SEEN, top, PADDED, LAYERS)
    weights = row + PADDED
    shared = tl.load(weights + 4) * core.of_tensor(statistics, _FEATURES, num_tensors, tensor)
    for k in tl.static_range(1, _SHARED):
        shared += tl.load(weights + 4 + k) * core.of_tensor(statistics, _FEATURES + k, num_tensors, tensor)
    x0, x1, x2, x3 = own
    of_own = tl.load(weights) * x0 + tl.load(weights + 1) * x1 + tl.load(weights + 2) * x2 + tl.load(weights + 3) * x3
    return out + (of_own + shared)


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    features, recurrent, below, biases, readout,
    momentum_decay, square_decay, momentum_rest, square_rest, eps, nominal_step, interpolation, log_step_gain,
    log_step_bound, mix_bound, log_averaging_bound,
    MAXIMIZE: tl.constexpr, LR_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    LAYERS: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step. ``readout`` is ``(4, PADDED + features + 1)``: units, features, bias."""
    tensor, first, size = core.place(tensors, chunks)
    size = core.unless_skipped(size, skip_at, SKIP)
    weights = (features, recurrent, below, biases)
    lr = core.rate(lr_at, lr_value, LR_IN_MEMORY)
    params = core.address(tensors, tensor, core.PARAM_FIELD, PARAM)
    grads = core.address(tensors, tensor, core.GRAD_FIELD, GRAD)
    averaging = (momentum_decay, square_decay, momentum_rest, square_rest, eps)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        where = (tensors, tensor, num_tensors, at, size)
        here = at < size
        grad = core.load_grad(grads, at, size, MAXIMIZE)
        param = core.load(params, at, size)
        momentum, square, a, g = core.adam_directions(where, grad, statistics, _MOMENTUM, _SQUARE, averaging)
        tl.store(core.numbers(tensors, tensor, 0) + at, momentum, mask=here)
        tl.store(core.numbers(tensors, tensor, 1) + at, square, mask=here)
        offset = core.load(core.numbers(tensors, tensor, 2), at, size)
        own = (a, g, tl.abs(a), offset * core.of_tensor(statistics, _PER_OFFSET, num_tensors, tensor))
        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        if LAYERS > 0:
            top = core.lstm(
                where, own, top, statistics, weights, _FEATURES, _SHARED, False, STATE, LAYERS, UNITS, PADDED, BLOCK
            )
        out0 = _output(0, readout, top, own, statistics, where, PADDED, LAYERS)
        out1 = _output(1, readout, top, own, statistics, where, PADDED, LAYERS)
        out2 = _output(2, readout, top, own, statistics, where, PADDED, LAYERS)
        out3 = _output(3, readout, top, own, statistics, where, PADDED, LAYERS)
        log_step = log_step_bound * core.tanh(out0 * (log_step_gain / log_step_bound))
        direction = (1.0 + core.bounded(out1, mix_bound)) * g + core.bounded(out2, mix_bound) * a
        moved = nominal_step * tl.exp(log_step) * direction
        nominal = core.of_tensor(statistics, _AVERAGING, num_tensors, tensor)
        weight = nominal * tl.exp(core.bounded(out3, log_averaging_bound))
        weight = tl.minimum(weight, 1.0, tl.PropagateNan.ALL)
        # What the average takes of the offset goes to the parameters, and what is left stays.
        offset = offset - interpolation * moved
        delta = weight * offset - (1.0 - interpolation) * moved
        tl.store(core.numbers(tensors, tensor, 2) + at, (1.0 - weight) * offset, mask=here)
        core.move(params, at, size, param, delta, lr, weight_decay, PARAM)


@triton.jit
def sums_kernel(
    tensors, chunks, corrections, num_tensors, sums, momentum_decay, square_decay, momentum_rest, square_rest, eps,
    way_limit,
    MAXIMIZE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, OWN_GRAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the rule takes the means of, added up over each chunk: ``sums (chunks, means)``."""
    tensor, first, size = core.place(tensors, chunks)
    at = first + tl.arange(0, CHUNK)
    where = (tensors, tensor, num_tensors, at, size)
    averaging = (momentum_decay, square_decay, momentum_rest, square_rest, eps)
    param = core.load(core.address(tensors, tensor, core.PARAM_FIELD, PARAM), at, size)
    grad = core.load_grad(core.address(tensors, tensor, core.GRAD_FIELD, GRAD), at, size, MAXIMIZE)
    slope = grad
    if OWN_GRAD is not None:
        slope = core.load_grad(core.address(tensors, tensor, core.OWN_GRAD_FIELD, OWN_GRAD), at, size, MAXIMIZE)
    slope = core.within(slope, way_limit)
    way = core.within(core.load(core.numbers(tensors, tensor, 3), at, size) - param, way_limit)
    offset = core.load(core.numbers(tensors, tensor, 2), at, size)
    _, _, a, g = core.adam_directions(where, grad, corrections, _MOMENTUM, _SQUARE, averaging)
    to = sums + _MEANS * tl.program_id(0)
    tl.store(to + _PARAM_SQUARE, tl.sum(param * param, axis=0))
    tl.store(to + _A_G, tl.sum(a * g, axis=0))
    tl.store(to + _A_SQUARE, tl.sum(a * a, axis=0))
    tl.store(to + _OFFSET_SQUARE, tl.sum(offset * offset, axis=0))
    tl.store(to + _OFFSET_A, tl.sum(offset * a, axis=0))
    tl.store(to + _SLOPE_WAY, tl.sum(slope * way, axis=0))
    tl.store(to + _SLOPE_SQUARE, tl.sum(slope * slope, axis=0))
    tl.store(to + _WAY_SQUARE, tl.sum(way * way, axis=0))


class Program(triton_backend.Program):
    step_kernel = step_kernel
    sums_kernel = sums_kernel
    entries = ("momentum", "square", "offset", "origin")
    num_means = len(Mean)

    def __init__(self, rule: ScheduleFreeRule) -> None:
        modulator = rule.modulator
        steps = ("nominal_step", "interpolation", "log_step_gain", "log_step_bound", "mix_bound", "log_averaging_bound")
        of_features, of_units = modulator.readout.weight.split(
            [_SEEN.value, modulator.readout.in_features - _SEEN.value], dim=1
        )
        none = modulator.readout.weight.new_zeros(1)
        without = {"features": none, "recurrent": none.half(), "below": none.half(), "biases": none}  # are not read
        config = rule.config
        moments = triton_backend.adam_arguments(config.momentum_decay, config.square_decay, config.eps)
        arguments = {
            **without,
            **{"LAYERS": 0, "UNITS": 0, "PADDED": triton_backend.padded_to(0)},
            **({} if modulator.lstm is None else triton_backend.lstm_arguments(modulator.lstm)),
            "readout": triton_backend.readout(of_units, of_features, modulator.readout.bias),
            **moments,
            **{name: getattr(config, name) for name in steps},
        }
        super().__init__(arguments, arguments["LAYERS"], {**moments, "way_limit": rule.way_limit})

    @classmethod
    def refusal(cls, rule):
        if (unknown := unknown_modulator(rule)) is not None:
            return unknown
        return None if rule.modulator.lstm is None else triton_backend.too_large(rule.modulator.lstm)
