""":class:`~learnedopt.rules.RNNpropRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.rules import RNNpropRule
from learnedopt.rules.rnnprop import Row

_MOMENTUM, _SQUARE = tl.constexpr(int(Row.MOMENTUM_CORRECTION)), tl.constexpr(int(Row.SQUARE_CORRECTION))


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    features, recurrent, below, biases, readout,
    momentum_decay, square_decay, momentum_rest, square_rest, eps, output_scale,
    MAXIMIZE: tl.constexpr, LR_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    LAYERS: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step. The layer before the LSTM is ``features (3, PADDED)``, biases last. ``readout`` is ``(PADDED + 1)``."""
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
        units = tl.arange(0, PADDED)
        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        top += tl.load(features + units)[:, None] * a[None, :]
        top += tl.load(features + PADDED + units)[:, None] * g[None, :]
        top += tl.load(features + 2 * PADDED + units)[:, None]
        top = tl.where(top > 0.0, top, tl.exp(tl.minimum(top, 0.0, tl.PropagateNan.ALL)) - 1.0)
        top = core.lstm(where, (a, g), top, statistics, weights, 0, 0, True, STATE, LAYERS, UNITS, PADDED, BLOCK)
        delta = -output_scale * core.tanh(core.of_units(readout, readout + PADDED, top, PADDED, LAYERS))
        core.move(params, at, size, param, delta, lr, weight_decay, PARAM)


class Program(triton_backend.Program):
    step_kernel = step_kernel
    entries = ("momentum", "square")

    def __init__(self, rule: RNNpropRule) -> None:
        config = rule.config
        arguments = {
            **triton_backend.lstm_arguments(rule.lstm, rule.inputs),
            "readout": triton_backend.readout(rule.readout.weight, None, rule.readout.bias),
            **triton_backend.adam_arguments(config.momentum_decay, config.square_decay, config.eps),
            "output_scale": config.output_scale,
        }
        super().__init__(arguments, rule.lstm.num_layers)

    @classmethod
    def refusal(cls, rule):
        return triton_backend.too_large(rule.lstm)
