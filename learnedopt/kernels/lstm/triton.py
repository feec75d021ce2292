""":class:`~learnedopt.rules.LSTMRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.rules import LSTMRule


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    features, recurrent, below, biases, readout,
    preprocessing_p, output_scale, LOG_SIGN: tl.constexpr,
    MAXIMIZE: tl.constexpr, LR_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    LAYERS: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step. ``readout`` is ``(PADDED + 1,)``."""
    tensor, first, size = core.place(tensors, chunks)
    size = core.unless_skipped(size, skip_at, SKIP)
    weights = (features, recurrent, below, biases)
    lr = core.rate(lr_at, lr_value, LR_IN_MEMORY)
    params = core.address(tensors, tensor, core.PARAM_FIELD, PARAM)
    grads = core.address(tensors, tensor, core.GRAD_FIELD, GRAD)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        where = (tensors, tensor, num_tensors, at, size)
        grad = core.load_grad(grads, at, size, MAXIMIZE)
        param = core.load(params, at, size)
        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        if LOG_SIGN:
            own = core.log_sign(grad, preprocessing_p)
            top = core.lstm(where, own, top, statistics, weights, 0, 0, False, STATE, LAYERS, UNITS, PADDED, BLOCK)
        else:
            top = core.lstm(where, (grad,), top, statistics, weights, 0, 0, False, STATE, LAYERS, UNITS, PADDED, BLOCK)
        delta = output_scale * core.of_units(readout, readout + PADDED, top, PADDED, LAYERS)
        core.move(params, at, size, param, delta, lr, weight_decay, PARAM)


class Program(triton_backend.Program):
    step_kernel = step_kernel

    def __init__(self, rule: LSTMRule) -> None:
        arguments = {
            **triton_backend.lstm_arguments(rule.lstm),
            "readout": triton_backend.readout(rule.readout.weight, None, rule.readout.bias),
            "preprocessing_p": rule.config.preprocessing_p,
            "output_scale": rule.config.output_scale,
            "LOG_SIGN": rule.config.preprocessing == "log_sign",
        }
        super().__init__(arguments, rule.lstm.num_layers)

    @classmethod
    def refusal(cls, rule):
        return triton_backend.too_large(rule.lstm)
