"""What Triton kernels of several rules are made of.

A program works on a chunk of one tensor, in blocks of coordinates. Tiles are ``(units, coordinates)``, as state lies in
memory: coordinates next to each other, units in rows. Units are padded to a power of two with weights of zero, which
keeps the padding's state at zero; it is neither read nor written.

``tensors`` has a row of addresses and sizes for each tensor (:class:`~learnedopt.kernels.core.tables.Field`),
``chunks`` a row ``(tensor, first coordinate)`` for each program. A step's kernel takes ``tensors``, ``chunks``, the
statistics, how many tensors there are, ``lr`` in memory and as a number, the weight decay, and where to read whether to
skip the step.
"""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core.tables import Field

_WIDTH = tl.constexpr(int(Field.NUMBERS) + 4)
_SIZE = tl.constexpr(int(Field.SIZE))
PARAM_FIELD, GRAD_FIELD = tl.constexpr(int(Field.PARAM)), tl.constexpr(int(Field.GRAD))
OWN_GRAD_FIELD = tl.constexpr(int(Field.OWN_GRAD))
_H, _H_SCALE = tl.constexpr(int(Field.H)), tl.constexpr(int(Field.H_SCALE))
_C, _C_LOW, _C_SCALE = tl.constexpr(int(Field.C)), tl.constexpr(int(Field.C_LOW)), tl.constexpr(int(Field.C_SCALE))
_NUMBERS = tl.constexpr(int(Field.NUMBERS))

_ROUND = tl.constexpr(12582912.0)
"""Added to a float32 of less than 2**22 and subtracted again, it leaves the nearest whole number, half to even."""


# A step's tensors --------------------------------------------------------------------------------------------------


@triton.jit
def place(tensors, chunks):
    """Which tensor a program works on, from which coordinate on, and how many coordinates the tensor has."""
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1)
    return tensor, first, tl.load(tensors + tensor * _WIDTH + _SIZE)


@triton.jit
def unless_skipped(size, skip_at, SKIP: tl.constexpr):
    """A size, or zero where the step is to be skipped."""
    if SKIP:
        size = tl.where(tl.load(skip_at) != 0, 0, size)
    return size


@triton.jit
def address(tensors, tensor, field: tl.constexpr, dtype: tl.constexpr):
    """Of what a tensor has in a field."""
    return tl.load(tensors + tensor * _WIDTH + field).to(tl.pointer_type(dtype))


@triton.jit
def numbers(tensors, tensor, index: tl.constexpr):
    """The address of one of the entries that are one number per coordinate."""
    return address(tensors, tensor, _NUMBERS + index, tl.float32)


@triton.jit
def load(values, at, size):
    """Numbers of some coordinates; zeros beyond the end."""
    return tl.load(values + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def load_grad(grads, at, size, MAXIMIZE: tl.constexpr):
    grad = load(grads, at, size)
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def of_tensor(statistics, row: tl.constexpr, num_tensors, tensor):
    """A tensor's number in a row of the statistics."""
    return tl.load(statistics + row * num_tensors + tensor)


@triton.jit
def rate(lr_at, lr_value, LR_IN_MEMORY: tl.constexpr):
    lr = lr_value
    if LR_IN_MEMORY:
        lr = tl.load(lr_at)
    return lr


@triton.jit
def move(params, at, size, param, delta, lr, weight_decay, PARAM: tl.constexpr):
    """Write the new parameters; at a rate of zero the old ones."""
    moved = param * (1.0 - lr * weight_decay) + lr * delta
    tl.store(params + at, tl.where(lr == 0.0, param, moved).to(PARAM), mask=at < size)


# Maths -------------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def bounded(x, bound):
    """Within a bound, and near zero x itself."""
    return bound * tanh(x / bound)


@triton.jit
def at_least(x, bound):
    return tl.maximum(x, bound, tl.PropagateNan.ALL)


@triton.jit
def within(x, bound):
    return tl.minimum(tl.maximum(x, -bound, tl.PropagateNan.ALL), bound, tl.PropagateNan.ALL)


@triton.jit
def in_range(grad):
    """As :func:`learnedopt.rules.moments.in_range`: half the root of the largest float32."""
    return within(grad, 9.223371873002223e18)


@triton.jit
def root(square):
    """Of the smallest normal number where it is less than that."""
    return tl.sqrt(at_least(square, 1.1754943508222875e-38))


@triton.jit
def log_sign(x, p):
    magnitude = at_least(tl.log(at_least(tl.abs(x), tl.exp(-p))) / p, -1.0)
    return magnitude, within(x * tl.exp(p), 1.0)


@triton.jit
def adam_directions(where, grad, statistics, MOMENTUM: tl.constexpr, SQUARE: tl.constexpr, averaging):
    """New moments, and the momentum and the gradient over the running RMS.

    The moments are the first two numbers of the state, and their corrections are in two rows of the statistics;
    ``averaging`` has both decays, one minus them, and ``eps``.
    """
    tensors, tensor, num_tensors, at, size = where
    decay0, decay1, rest0, rest1, eps = averaging
    grad = in_range(grad)
    momentum = decay0 * load(numbers(tensors, tensor, 0), at, size) + rest0 * grad
    square = decay1 * load(numbers(tensors, tensor, 1), at, size) + rest1 * (grad * grad)
    correction0 = of_tensor(statistics, MOMENTUM, num_tensors, tensor)
    correction1 = of_tensor(statistics, SQUARE, num_tensors, tensor)
    rms = root(square * correction1) + eps
    return momentum, square, momentum * correction0 / rms, grad / rms


@triton.jit
def of_units(readout, bias, top, PADDED: tl.constexpr, LAYERS: tl.constexpr):
    """One output's bias, and what the units of the last layer contribute to it."""
    out = tl.load(bias)
    if LAYERS > 0:
        out += tl.sum(tl.load(readout + tl.arange(0, PADDED))[:, None] * top, axis=0)
    return out


# An LSTM -----------------------------------------------------------------------------------------------------------


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
    values, lows, scales, at, size, x, layer: tl.constexpr,
    UNITS: tl.constexpr, PADDED: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
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
def lstm(
    where, own, top, statistics, weights,
    FIRST: tl.constexpr, SHARED: tl.constexpr, FROM_TOP: tl.constexpr, STATE: tl.constexpr,
    LAYERS: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance all layers at some coordinates; returns the last one's units, ``(PADDED, BLOCK)``.

    The first layer's features are the rows ``own``, and ``SHARED`` rows of the statistics from ``FIRST`` on; or ``top``
    where it is ``FROM_TOP``. The weights are ``features (4, own + shared, PADDED)``, ``recurrent (2, LAYERS, 4, PADDED,
    PADDED)`` in two float16 each, ``below`` the same for the layers above the first, and for that too where it is
    ``FROM_TOP``, and ``biases (LAYERS, 4, PADDED)``. Gates are in the order of the rule: input, forget, cell, output.
    """
    tensors, tensor, num_tensors, at, size = where
    features, recurrent, below, biases = weights
    hs, cs = address(tensors, tensor, _H, STATE), address(tensors, tensor, _C, STATE)
    c_lows = address(tensors, tensor, _C_LOW, tl.uint8)
    h_scales = address(tensors, tensor, _H_SCALE, tl.bfloat16)
    c_scales = address(tensors, tensor, _C_SCALE, tl.bfloat16)
    units = tl.arange(0, PADDED)
    square_at = units[:, None] * PADDED + units[None, :]
    first_below: tl.constexpr = 0 if FROM_TOP else 1
    num_own: tl.constexpr = len(own)
    for layer in tl.static_range(LAYERS):
        h = _load_units(hs, None, h_scales, at, size, layer, UNITS, PADDED, STATE)
        high, low = _split(h)
        below_high, below_low = _split(top)
        cell = _load_units(cs, c_lows, c_scales, at, size, layer, UNITS, PADDED, STATE)
        update = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        output = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        for gate in tl.static_range(4):
            bias = tl.load(biases + (layer * 4 + gate) * PADDED + units)
            weights = features + gate * (num_own + SHARED) * PADDED + units
            if layer == 0:
                for k in tl.static_range(SHARED):
                    shared = of_tensor(statistics, FIRST + k, num_tensors, tensor)
                    bias += tl.load(weights + (num_own + k) * PADDED) * shared
            z = tl.broadcast_to(bias[:, None], (PADDED, BLOCK))
            if layer < first_below:
                for k in tl.static_range(num_own):
                    z += tl.load(weights + k * PADDED)[:, None] * own[k][None, :]
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
                cell += update * tanh(z)
            else:
                output = tl.sigmoid(z)
        # A padded unit's cell is zero: half of what it was, plus half of nothing.
        top = output * tanh(cell)
        _store_units(hs, None, h_scales, at, size, top, layer, UNITS, PADDED, STATE)
        _store_units(cs, c_lows, c_scales, at, size, cell, layer, UNITS, PADDED, STATE)
    return top
