"""The kernels of the Triton backend: a step of a rule on many tensors, in one pass over their state.

A program works on a chunk of one tensor, in blocks of coordinates. Tiles are ``(units, coordinates)``, as state lies in
memory: coordinates next to each other, units in rows. Units are padded to a power of two with weights of zero, which
keeps the padding's state at zero; it is neither read nor written.

``tensors`` has a row of addresses and sizes for each tensor (:data:`FIELDS`), ``chunks`` a row ``(tensor, first
coordinate)`` for each program.
"""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = ("param", "grad", "size", "h", "h_scale", "c", "c_low", "c_scale", "scalar0", "scalar1", "scalar2", "scalar3")
_FIELDS = tl.constexpr(len(FIELDS))

LSTM, META_LSTM, ADAM_LSTM, SCHEDULE_FREE_LSTM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RNNPROP = tl.constexpr(4)

_ROUND = tl.constexpr(12582912.0)
"""Added to a float32 of less than 2**22 and subtracted again, it leaves the nearest whole number, half to even."""


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _row(tensors, tensor, field: tl.constexpr, dtype: tl.constexpr):
    """The address of what a tensor has in a field."""
    return tl.load(tensors + tensor * _FIELDS + field).to(tl.pointer_type(dtype))


@triton.jit
def _load_units(
    values, lows, scales, at, size, layer: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr, STATE: tl.constexpr
):
    """A layer's units at some coordinates, ``(PADDED, coordinates)``. ``lows``: of codes of ten bits, else ``None``."""
    units, here = tl.arange(0, PADDED), at < size
    inside = (units < UNITS)[:, None] & here[None, :]
    x = tl.load(values + (layer * UNITS + units)[:, None] * size + at[None, :], mask=inside, other=0).to(tl.float32)
    if tl.int8 == STATE:
        scale = tl.load(scales + layer * size + at, mask=here, other=0.0).to(tl.float32)
        if lows is None:
            scale = scale * (1.0 / 16129.0)
        else:
            row = layer * ((UNITS + 3) // 4) + units // 4
            low = tl.load(lows + row[:, None] * size + at[None, :], mask=inside, other=0).to(tl.int32)
            x = 4.0 * x + ((low >> (2 * (units % 4))[:, None]) & 3).to(tl.float32)
            scale = scale * (1.0 / 261121.0)
        x = x * tl.abs(x) * scale[None, :]
    return x


@triton.jit
def _store_units(
    values,
    lows,
    scales,
    at,
    size,
    x,
    layer: tl.constexpr,
    UNITS: tl.constexpr,
    PADDED: tl.constexpr,
    STATE: tl.constexpr,
):
    units, here = tl.arange(0, PADDED), at < size
    inside = (units < UNITS)[:, None] & here[None, :]
    values += (layer * UNITS + units)[:, None] * size + at[None, :]
    if tl.int8 == STATE:
        # The sum is zero, but for what is not finite, which a maximum may overlook.
        scale = (tl.max(tl.abs(x), axis=0) + tl.sum(x * 0.0, axis=0)).to(tl.bfloat16)
        tl.store(scales + layer * size + at, scale, mask=here)
        most: tl.constexpr = 127.0 if lows is None else 511.0
        codes = tl.sqrt(tl.abs(x) * (most * most / tl.maximum(scale.to(tl.float32), 1e-30))[None, :])
        codes = tl.minimum((codes + _ROUND) - _ROUND, most, tl.PropagateNan.ALL)
        codes = tl.where(codes == codes, tl.where(x < 0.0, -codes, codes), 0.0).to(tl.int32)
        if lows is None:
            tl.store(values, codes.to(tl.int8), mask=inside)
        else:
            tl.store(values, (codes >> 2).to(tl.int8), mask=inside)
            digits = (codes & 3) << (2 * (units % 4))[:, None]
            low = tl.sum(tl.reshape(digits, (PADDED // 4, 4, at.shape[0])), axis=1)
            rows: tl.constexpr = (UNITS + 3) // 4
            row = tl.arange(0, PADDED // 4)
            to = lows + (layer * rows + row)[:, None] * size + at[None, :]
            tl.store(to, low.to(tl.uint8), mask=(row < rows)[:, None] & here[None, :])
    else:
        tl.store(values, x.to(STATE), mask=inside)


@triton.jit
def _at_least(x, bound):
    return tl.maximum(x, bound, tl.PropagateNan.ALL)


@triton.jit
def _within(x, bound):
    return tl.minimum(tl.maximum(x, -bound, tl.PropagateNan.ALL), bound, tl.PropagateNan.ALL)


@triton.jit
def _log_sign(x, p):
    magnitude = _at_least(tl.log(_at_least(tl.abs(x), tl.exp(-p))) / p, -1.0)
    return magnitude, _within(x * tl.exp(p), 1.0)


@triton.jit
def _directions(grad, fast, slow, square, corrections, column, num_tensors, decay0, decay1, decay2, eps):
    """New moments, and both momenta and the gradient over the running RMS."""
    grad = _within(grad, 9.223371873002223e18)  # half the root of the largest float32
    fast = grad + decay0 * (fast - grad)
    slow = grad + decay1 * (slow - grad)
    square = grad * grad + decay2 * (square - grad * grad)
    correction0 = tl.load(corrections + column)
    correction1 = tl.load(corrections + num_tensors + column)
    correction2 = tl.load(corrections + 2 * num_tensors + column)
    rms = tl.sqrt(_at_least(square * correction2, 1.1754943508222875e-38)) + eps
    return fast, slow, square, fast * correction0 / rms, slow * correction1 / rms, grad / rms


@triton.jit
def _averages(grad, momentum, square, corrections, column, num_tensors, decay0, decay1, rest0, rest1, eps):
    """New moments, and the momentum and the gradient over the running RMS; ``rest`` is one minus ``decay``."""
    grad = _within(grad, 9.223371873002223e18)  # half the root of the largest float32
    momentum = decay0 * momentum + rest0 * grad
    square = decay1 * square + rest1 * (grad * grad)
    correction0 = tl.load(corrections + column)
    correction1 = tl.load(corrections + num_tensors + column)
    rms = tl.sqrt(_at_least(square * correction1, 1.1754943508222875e-38)) + eps
    return momentum, square, momentum * correction0 / rms, grad / rms


@triton.jit
def _split(x):
    """What float16 holds of numbers, and what it leaves over: together 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _product(weights, rest: tl.constexpr, high, low, z):
    """Add a matrix product of near float32's precision; ``rest`` is where the rest of the weights begins."""
    weights_high, weights_low = tl.load(weights), tl.load(weights + rest)
    z = tl.dot(weights_low, high, z)
    z = tl.dot(weights_high, low, z)
    return tl.dot(weights_high, high, z)


@triton.jit
def _origin(origins, at, here, corrections, column, num_tensors, param):
    """The parameters at the first step, before which the state is zero."""
    return tl.load(origins + at, mask=here, other=0.0) + tl.load(corrections + 2 * num_tensors + column) * param


@triton.jit
def _of_units(readout, top, PADDED: tl.constexpr, LAYERS: tl.constexpr):
    """One output's bias, and what the units of the last layer contribute to it."""
    out = tl.load(readout + PADDED + 3)
    if LAYERS > 0:
        out += tl.sum(tl.load(readout + tl.arange(0, PADDED))[:, None] * top, axis=0)
    return out


@triton.jit
def _of_features(weights, statistics, column, num_tensors, x0, x1, x2, x3):
    """What the features of the Schedule-Free LSTM contribute to one output."""
    shared = tl.load(weights + 4) * tl.load(statistics + 5 * num_tensors + column)
    for k in tl.static_range(1, 10):
        shared += tl.load(weights + 4 + k) * tl.load(statistics + (5 + k) * num_tensors + column)
    own = tl.load(weights) * x0 + tl.load(weights + 1) * x1 + tl.load(weights + 2) * x2 + tl.load(weights + 3) * x3
    return own + shared


@triton.jit
def step_kernel(
    tensors,
    chunks,
    statistics,
    num_tensors,
    features,
    recurrent,
    below,
    biases,
    readout,
    lr_at,
    lr_value,
    weight_decay,
    skip_at,
    p,
    scale,
    decay0,
    decay1,
    decay2,
    rest0,
    rest1,
    eps,
    step_gain,
    step_bound,
    mix_bound,
    averaging_bound,
    interpolation,
    RULE: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    FEEDBACK_IS_GATE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    LR_IN_MEMORY: tl.constexpr,
    SKIP: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    LAYERS: tl.constexpr,
    UNITS: tl.constexpr,
    PADDED: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step.

    Weights are ``features (4, FEATURES, PADDED)``, ``recurrent (2, LAYERS, 4, PADDED, PADDED)`` in two float16 each,
    ``below`` the same for the layers above the first, ``biases (LAYERS, 4, PADDED)`` and
    ``readout (outputs, PADDED + 4)``, followed by ``(outputs, FEATURES)`` where the read-out has the features too;
    without layers it alone is read. Gates are in the order of the rule: input, forget, cell, output. RNNprop has a
    layer before them, ``features (3, PADDED)`` with its biases last, so that for it ``below`` has the first layer too.
    """
    if SKIP:  # noqa: SIM102, the one is known when this is compiled, the other is not
        if tl.load(skip_at) != 0:
            return
    lr = lr_value
    if LR_IN_MEMORY:
        lr = tl.load(lr_at)
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1)
    size = tl.load(tensors + tensor * _FIELDS + 2)
    params, grads = _row(tensors, tensor, 0, PARAM), _row(tensors, tensor, 1, GRAD)
    hs, cs = _row(tensors, tensor, 3, STATE), _row(tensors, tensor, 5, STATE)
    c_lows = _row(tensors, tensor, 6, tl.uint8)
    h_scales, c_scales = _row(tensors, tensor, 4, tl.bfloat16), _row(tensors, tensor, 7, tl.bfloat16)
    units = tl.arange(0, PADDED)
    square_at = units[:, None] * PADDED + units[None, :]
    first_below: tl.constexpr = 0 if RULE == RNNPROP else 1

    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        here = at < size
        grad = tl.load(grads + at, mask=here, other=0.0).to(tl.float32)
        param = tl.load(params + at, mask=here, other=0.0).to(tl.float32)
        if MAXIMIZE:
            grad = -grad

        x0, x1, x2, x3, x4 = grad, grad, grad, grad, grad
        if RULE == ADAM_LSTM:
            fasts, slows, squares = (
                _row(tensors, tensor, 8, tl.float32),
                _row(tensors, tensor, 9, tl.float32),
                _row(tensors, tensor, 10, tl.float32),
            )
            fast = tl.load(fasts + at, mask=here, other=0.0)
            slow = tl.load(slows + at, mask=here, other=0.0)
            square = tl.load(squares + at, mask=here, other=0.0)
            fast, slow, square, x0, x1, x2 = _directions(
                grad, fast, slow, square, statistics, tensor, num_tensors, decay0, decay1, decay2, eps
            )
            tl.store(fasts + at, fast, mask=here)
            tl.store(slows + at, slow, mask=here)
            tl.store(squares + at, square, mask=here)
            x3, x4 = tl.abs(x0), tl.abs(x1)
        offset = grad
        if RULE == SCHEDULE_FREE_LSTM:
            momenta, squares = _row(tensors, tensor, 8, tl.float32), _row(tensors, tensor, 9, tl.float32)
            momentum = tl.load(momenta + at, mask=here, other=0.0)
            square = tl.load(squares + at, mask=here, other=0.0)
            offset = tl.load(_row(tensors, tensor, 10, tl.float32) + at, mask=here, other=0.0)
            momentum, square, x0, x1 = _averages(
                grad, momentum, square, statistics, tensor, num_tensors, decay0, decay1, rest0, rest1, eps
            )
            tl.store(momenta + at, momentum, mask=here)
            tl.store(squares + at, square, mask=here)
            x2, x3 = tl.abs(x0), offset * tl.load(statistics + 4 * num_tensors + tensor)
            origins = _row(tensors, tensor, 11, tl.float32)
            origin = _origin(origins, at, here, statistics, tensor, num_tensors, param)
            tl.store(origins + at, origin, mask=here)
        if RULE == RNNPROP:
            momenta, squares = _row(tensors, tensor, 8, tl.float32), _row(tensors, tensor, 9, tl.float32)
            momentum = tl.load(momenta + at, mask=here, other=0.0)
            square = tl.load(squares + at, mask=here, other=0.0)
            momentum, square, x0, x1 = _averages(
                grad, momentum, square, statistics, tensor, num_tensors, decay0, decay1, rest0, rest1, eps
            )
            tl.store(momenta + at, momentum, mask=here)
            tl.store(squares + at, square, mask=here)
        if RULE == META_LSTM:
            grad = grad / scale
        if LOG_SIGN:
            x0, x1 = _log_sign(grad, p)

        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        if RULE == RNNPROP:
            top += tl.load(features + units)[:, None] * x0[None, :]
            top += tl.load(features + PADDED + units)[:, None] * x1[None, :]
            top += tl.load(features + 2 * PADDED + units)[:, None]
            top = tl.where(top > 0.0, top, tl.exp(tl.minimum(top, 0.0, tl.PropagateNan.ALL)) - 1.0)
        for layer in tl.static_range(LAYERS):
            h = _load_units(hs, None, h_scales, at, size, layer, UNITS, PADDED, STATE)
            high, low = _split(h)
            below_high, below_low = _split(top)
            cell = _load_units(cs, c_lows, c_scales, at, size, layer, UNITS, PADDED, STATE)
            update = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
            output = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
            for gate in tl.static_range(4):
                bias = tl.load(biases + (layer * 4 + gate) * PADDED + units)
                weights = features + gate * FEATURES * PADDED + units
                if layer == 0 and RULE == META_LSTM:
                    for k in tl.static_range(2):
                        bias += tl.load(weights + (2 + k) * PADDED) * tl.load(statistics + k * num_tensors + tensor)
                if layer == 0 and RULE == ADAM_LSTM:
                    for k in tl.static_range(4):
                        shared = tl.load(statistics + (3 + k) * num_tensors + tensor)
                        bias += tl.load(weights + (5 + k) * PADDED) * shared
                if layer == 0 and RULE == SCHEDULE_FREE_LSTM:
                    for k in tl.static_range(10):
                        shared = tl.load(statistics + (5 + k) * num_tensors + tensor)
                        bias += tl.load(weights + (4 + k) * PADDED) * shared
                z = tl.broadcast_to(bias[:, None], (PADDED, BLOCK))
                if layer == 0 and RULE != RNNPROP:
                    z += tl.load(weights)[:, None] * x0[None, :]
                    if LOG_SIGN or RULE >= ADAM_LSTM:
                        z += tl.load(weights + PADDED)[:, None] * x1[None, :]
                    if RULE >= ADAM_LSTM:
                        z += tl.load(weights + 2 * PADDED)[:, None] * x2[None, :]
                        z += tl.load(weights + 3 * PADDED)[:, None] * x3[None, :]
                    if RULE == ADAM_LSTM:
                        z += tl.load(weights + 4 * PADDED)[:, None] * x4[None, :]
                else:
                    weights_below = below + ((layer - first_below) * 4 + gate) * PADDED * PADDED + square_at
                    z = _product(weights_below, (LAYERS - first_below) * 4 * PADDED * PADDED, below_high, below_low, z)
                weights_own = recurrent + (layer * 4 + gate) * PADDED * PADDED + square_at
                z = _product(weights_own, LAYERS * 4 * PADDED * PADDED, high, low, z)
                if gate == 0:
                    update = tl.sigmoid(z)
                elif gate == 1:
                    cell = tl.sigmoid(z) * cell
                elif gate == 2:
                    cell += update * _tanh(z)
                else:
                    output = tl.sigmoid(z)
            # A padded unit's cell is zero: half of what it was, plus half of nothing.
            top = output * _tanh(cell)
            _store_units(hs, None, h_scales, at, size, top, layer, UNITS, PADDED, STATE)
            _store_units(cs, c_lows, c_scales, at, size, cell, layer, UNITS, PADDED, STATE)

        row: tl.constexpr = PADDED + 4
        out = _of_units(readout, top, PADDED, LAYERS)
        if RULE == LSTM:
            delta = scale * out
        elif RULE == RNNPROP:
            delta = -scale * _tanh(out)
        else:
            second = _of_units(readout + row, top, PADDED, LAYERS)
            if RULE == META_LSTM:
                forgets, inputs = _row(tensors, tensor, 8, tl.float32), _row(tensors, tensor, 9, tl.float32)
                out += tl.load(readout + PADDED) * param
                out += tl.load(readout + PADDED + 1) * tl.load(forgets + at, mask=here, other=0.0)
                second += tl.load(readout + row + PADDED) * param
                second += tl.load(readout + row + PADDED + 2) * tl.load(inputs + at, mask=here, other=0.0)
                forget, input_ = tl.sigmoid(out), tl.sigmoid(second)
                delta = (forget - 1.0) * param - input_ * grad
                tl.store(forgets + at, forget if FEEDBACK_IS_GATE else out, mask=here)
                tl.store(inputs + at, input_ if FEEDBACK_IS_GATE else second, mask=here)
            else:
                third = _of_units(readout + 2 * row, top, PADDED, LAYERS)
                if RULE == SCHEDULE_FREE_LSTM:
                    fourth = _of_units(readout + 3 * row, top, PADDED, LAYERS)
                    of_features = readout + 4 * row
                    out += _of_features(of_features, statistics, tensor, num_tensors, x0, x1, x2, x3)
                    second += _of_features(of_features + 14, statistics, tensor, num_tensors, x0, x1, x2, x3)
                    third += _of_features(of_features + 28, statistics, tensor, num_tensors, x0, x1, x2, x3)
                    fourth += _of_features(of_features + 42, statistics, tensor, num_tensors, x0, x1, x2, x3)
                log_step = step_bound * _tanh(out * (step_gain / step_bound))
                mix0, mix1 = mix_bound * _tanh(second / mix_bound), mix_bound * _tanh(third / mix_bound)
                if RULE == SCHEDULE_FREE_LSTM:
                    move = scale * tl.exp(log_step) * ((1.0 + mix0) * x1 + mix1 * x0)
                    nominal = tl.load(statistics + 3 * num_tensors + tensor)
                    weight = nominal * tl.exp(averaging_bound * _tanh(fourth / averaging_bound))
                    weight = tl.minimum(weight, 1.0, tl.PropagateNan.ALL)
                    # What the average takes of the offset goes to the parameters, and what is left stays.
                    offset = offset - interpolation * move
                    delta = weight * offset - (1.0 - interpolation) * move
                    tl.store(_row(tensors, tensor, 10, tl.float32) + at, (1.0 - weight) * offset, mask=here)
                else:
                    delta = -scale * tl.exp(log_step) * ((1.0 + mix0) * x0 + mix1 * x1)
        moved = param * (1.0 - lr * weight_decay) + lr * delta
        tl.store(params + at, tl.where(lr == 0.0, param, moved).to(PARAM), mask=here)


@triton.jit
def sums_kernel(
    tensors,
    chunks,
    corrections,
    num_tensors,
    sums,
    decay0,
    decay1,
    decay2,
    rest0,
    rest1,
    eps,
    way_limit,
    RULE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What :class:`AdamLSTMRule` or :class:`ScheduleFreeLSTMRule` takes the means of, added up over each chunk: ``sums
    (chunks, 3)`` or ``(chunks, 8)``."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk)
    at = tl.load(chunks + 2 * chunk + 1) + tl.arange(0, CHUNK)
    here = at < tl.load(tensors + tensor * _FIELDS + 2)
    param = tl.load(_row(tensors, tensor, 0, PARAM) + at, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(_row(tensors, tensor, 1, GRAD) + at, mask=here, other=0.0).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    first = tl.load(_row(tensors, tensor, 8, tl.float32) + at, mask=here, other=0.0)
    second = tl.load(_row(tensors, tensor, 9, tl.float32) + at, mask=here, other=0.0)
    third = tl.load(_row(tensors, tensor, 10, tl.float32) + at, mask=here, other=0.0)
    if RULE == SCHEDULE_FREE_LSTM:
        _, _, a, g = _averages(grad, first, second, corrections, tensor, num_tensors, decay0, decay1, rest0, rest1, eps)
        origin = _origin(_row(tensors, tensor, 11, tl.float32), at, here, corrections, tensor, num_tensors, param)
        way, slope = _within(origin - param, way_limit), _within(grad, way_limit)
        to = sums + 8 * chunk
        tl.store(to + 5, tl.sum(slope * way, axis=0))
        tl.store(to + 6, tl.sum(slope * slope, axis=0))
        tl.store(to + 7, tl.sum(way * way, axis=0))
        tl.store(to + 2, tl.sum(a * a, axis=0))
        tl.store(to + 3, tl.sum(third * third, axis=0))
        tl.store(to + 4, tl.sum(third * a, axis=0))
    else:
        _, _, _, a, b, g = _directions(
            grad, first, second, third, corrections, tensor, num_tensors, decay0, decay1, decay2, eps
        )
        to = sums + 3 * chunk
        tl.store(to + 2, tl.sum(b * b, axis=0))
    tl.store(to, tl.sum(param * param, axis=0))
    tl.store(to + 1, tl.sum(a * g, axis=0))
