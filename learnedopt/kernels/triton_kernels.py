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

FIELDS = ("param", "grad", "size", "h", "h_scale", "c", "c_scale", "scalar0", "scalar1", "scalar2")
_FIELDS = tl.constexpr(len(FIELDS))

LSTM, META_LSTM, ADAM_LSTM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

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
def _load_units(values, scales, at, mask, coordinates, size, layer: tl.constexpr, STATE: tl.constexpr):
    x = tl.load(values + at, mask=mask, other=0).to(tl.float32)
    if tl.int8 == STATE:
        scale = tl.load(scales + layer * size + coordinates, mask=coordinates < size, other=0.0).to(tl.float32)
        x = x * tl.abs(x) * (scale * (1.0 / 16129.0))[None, :]
    return x


@triton.jit
def _store_units(values, scales, at, mask, coordinates, size, x, layer: tl.constexpr, STATE: tl.constexpr):
    if tl.int8 == STATE:
        # The sum is zero, but for what is not finite, which a maximum may overlook.
        scale = (tl.max(tl.abs(x), axis=0) + tl.sum(x * 0.0, axis=0)).to(tl.bfloat16)
        tl.store(scales + layer * size + coordinates, scale, mask=coordinates < size)
        codes = tl.sqrt(tl.abs(x) * (16129.0 / tl.maximum(scale.to(tl.float32), 1e-30))[None, :])
        codes = (codes + _ROUND) - _ROUND
        codes = tl.where(codes == codes, tl.where(x < 0.0, -codes, codes), 0.0)
        tl.store(values + at, codes.to(tl.int8), mask=mask)
    else:
        tl.store(values + at, x.to(STATE), mask=mask)


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
def _split(x):
    """What float16 holds of numbers of at most one, and what it leaves over: together 22 bits."""
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
    eps,
    step_gain,
    step_bound,
    mix_bound,
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
    ``readout (outputs, PADDED + 4)``. Gates are in the order of the rule: input, forget, cell, output.
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
    h_scales, c_scales = _row(tensors, tensor, 4, tl.bfloat16), _row(tensors, tensor, 6, tl.bfloat16)
    units = tl.arange(0, PADDED)
    square_at = units[:, None] * PADDED + units[None, :]

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
                _row(tensors, tensor, 7, tl.float32),
                _row(tensors, tensor, 8, tl.float32),
                _row(tensors, tensor, 9, tl.float32),
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
        if RULE == META_LSTM:
            grad = grad / scale
        if LOG_SIGN:
            x0, x1 = _log_sign(grad, p)

        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        for layer in tl.static_range(LAYERS):
            tile = (layer * UNITS + units)[:, None] * size + at[None, :]
            inside = (units < UNITS)[:, None] & here[None, :]
            h = _load_units(hs, h_scales, tile, inside, at, size, layer, STATE)
            high, low = _split(h)
            below_high, below_low = _split(top)
            cell = _load_units(cs, c_scales, tile, inside, at, size, layer, STATE)
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
                z = tl.broadcast_to(bias[:, None], (PADDED, BLOCK))
                if layer == 0:
                    z += tl.load(weights)[:, None] * x0[None, :]
                    if LOG_SIGN or RULE == ADAM_LSTM:
                        z += tl.load(weights + PADDED)[:, None] * x1[None, :]
                    if RULE == ADAM_LSTM:
                        z += tl.load(weights + 2 * PADDED)[:, None] * x2[None, :]
                        z += tl.load(weights + 3 * PADDED)[:, None] * x3[None, :]
                        z += tl.load(weights + 4 * PADDED)[:, None] * x4[None, :]
                else:
                    weights_below = below + ((layer - 1) * 4 + gate) * PADDED * PADDED + square_at
                    z = _product(weights_below, (LAYERS - 1) * 4 * PADDED * PADDED, below_high, below_low, z)
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
            _store_units(hs, h_scales, tile, inside, at, size, top, layer, STATE)
            _store_units(cs, c_scales, tile, inside, at, size, cell, layer, STATE)

        row: tl.constexpr = PADDED + 4
        out = tl.sum(tl.load(readout + units)[:, None] * top, axis=0) + tl.load(readout + PADDED + 3)
        if RULE == LSTM:
            delta = scale * out
        else:
            second = tl.sum(tl.load(readout + row + units)[:, None] * top, axis=0) + tl.load(readout + row + PADDED + 3)
            if RULE == META_LSTM:
                forgets, inputs = _row(tensors, tensor, 7, tl.float32), _row(tensors, tensor, 8, tl.float32)
                out += tl.load(readout + PADDED) * param
                out += tl.load(readout + PADDED + 1) * tl.load(forgets + at, mask=here, other=0.0)
                second += tl.load(readout + row + PADDED) * param
                second += tl.load(readout + row + PADDED + 2) * tl.load(inputs + at, mask=here, other=0.0)
                forget, input_ = tl.sigmoid(out), tl.sigmoid(second)
                delta = (forget - 1.0) * param - input_ * grad
                tl.store(forgets + at, forget if FEEDBACK_IS_GATE else out, mask=here)
                tl.store(inputs + at, input_ if FEEDBACK_IS_GATE else second, mask=here)
            else:
                third = tl.sum(tl.load(readout + 2 * row + units)[:, None] * top, axis=0)
                third += tl.load(readout + 2 * row + PADDED + 3)
                log_step = step_bound * _tanh(out * (step_gain / step_bound))
                mix0, mix1 = mix_bound * _tanh(second / mix_bound), mix_bound * _tanh(third / mix_bound)
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
    eps,
    MAXIMIZE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What :class:`AdamLSTMRule` takes the means of, added up over each chunk: ``sums (chunks, 3)``."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 2 * chunk)
    at = tl.load(chunks + 2 * chunk + 1) + tl.arange(0, CHUNK)
    here = at < tl.load(tensors + tensor * _FIELDS + 2)
    param = tl.load(_row(tensors, tensor, 0, PARAM) + at, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(_row(tensors, tensor, 1, GRAD) + at, mask=here, other=0.0).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    fast = tl.load(_row(tensors, tensor, 7, tl.float32) + at, mask=here, other=0.0)
    slow = tl.load(_row(tensors, tensor, 8, tl.float32) + at, mask=here, other=0.0)
    square = tl.load(_row(tensors, tensor, 9, tl.float32) + at, mask=here, other=0.0)
    _, _, _, a, b, g = _directions(
        grad, fast, slow, square, corrections, tensor, num_tensors, decay0, decay1, decay2, eps
    )
    tl.store(sums + 3 * chunk, tl.sum(param * param, axis=0))
    tl.store(sums + 3 * chunk + 1, tl.sum(a * g, axis=0))
    tl.store(sums + 3 * chunk + 2, tl.sum(b * b, axis=0))
