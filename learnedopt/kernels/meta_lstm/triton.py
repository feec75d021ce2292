""":class:`~learnedopt.rules.MetaLSTMRule` as Triton kernels."""

# mypy: ignore-errors
# What triton compiles is a language of its own, without types that a checker of Python's could know.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from learnedopt.kernels.core import triton as core
from learnedopt.kernels.core import triton_backend
from learnedopt.rules import MetaLSTMRule
from learnedopt.rules.meta_lstm import Row

_FEATURES, _SHARED = tl.constexpr(int(Row.FEATURES)), tl.constexpr(len(Row) - Row.FEATURES)


@triton.jit
def step_kernel(
    tensors, chunks, statistics, num_tensors, lr_at, lr_value, weight_decay, skip_at,
    features, recurrent, below, biases, readout,
    preprocessing_p, gradient_divisor, FEEDBACK_IS_GATE: tl.constexpr,
    MAXIMIZE: tl.constexpr, LR_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    LAYERS: tl.constexpr, UNITS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step. ``readout`` is ``(2, PADDED + 3)``: units, parameter, the gate's own past, bias."""
    tensor, first, size = core.place(tensors, chunks)
    size = core.unless_skipped(size, skip_at, SKIP)
    weights = (features, recurrent, below, biases)
    lr = core.rate(lr_at, lr_value, LR_IN_MEMORY)
    params = core.address(tensors, tensor, core.PARAM_FIELD, PARAM)
    grads = core.address(tensors, tensor, core.GRAD_FIELD, GRAD)
    for start in range(0, tl.minimum(size - first, CHUNK), BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        where = (tensors, tensor, num_tensors, at, size)
        here = at < size
        grad = core.load_grad(grads, at, size, MAXIMIZE)
        param = core.load(params, at, size)
        grad = grad / gradient_divisor
        top = tl.zeros((PADDED, BLOCK), dtype=tl.float32)
        own = core.log_sign(grad, preprocessing_p)
        top = core.lstm(
            where, own, top, statistics, weights, _FEATURES, _SHARED, False, STATE, LAYERS, UNITS, PADDED, BLOCK
        )
        forgets, inputs = core.numbers(tensors, tensor, 0), core.numbers(tensors, tensor, 1)
        z = _gate(readout, top, param, core.load(forgets, at, size), PADDED, LAYERS)
        forget = tl.sigmoid(z)
        tl.store(forgets + at, forget if FEEDBACK_IS_GATE else z, mask=here)
        z = _gate(readout + PADDED + 3, top, param, core.load(inputs, at, size), PADDED, LAYERS)
        input_ = tl.sigmoid(z)
        tl.store(inputs + at, input_ if FEEDBACK_IS_GATE else z, mask=here)
        delta = (forget - 1.0) * param - input_ * grad
        core.move(params, at, size, param, delta, lr, weight_decay, PARAM)


@triton.jit
def _gate(readout, top, param, past, PADDED: tl.constexpr, LAYERS: tl.constexpr):
    z = core.of_units(readout, readout + PADDED + 2, top, PADDED, LAYERS)
    z += tl.load(readout + PADDED) * param
    return z + tl.load(readout + PADDED + 1) * past


class Program(triton_backend.Program):
    step_kernel = step_kernel
    entries = ("forget", "input")

    def __init__(self, rule: MetaLSTMRule) -> None:
        units = rule.config.hidden_size
        gates = [
            triton_backend.readout(gate.weight[:, :units], gate.weight[:, units:], gate.bias)
            for gate in (rule.forget_gate, rule.input_gate)
        ]
        arguments = {
            **triton_backend.lstm_arguments(rule.lstm),
            "readout": torch.cat(gates),
            "preprocessing_p": rule.config.preprocessing_p,
            "gradient_divisor": rule.config.gradient_divisor,
            "FEEDBACK_IS_GATE": rule.config.gate_feedback == "gate",
        }
        super().__init__(arguments, rule.lstm.num_layers)

    @classmethod
    def refusal(cls, rule):
        return triton_backend.too_large(rule.lstm)
