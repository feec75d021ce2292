"""One launch for a step on CUDA: preprocessing, LSTM, read-out and the update of parameters in one pass over the state.

Nothing waits for the device: a tensor ``lr`` and ``skip`` are read by the kernel. Addresses go to the device in a table
that is kept as long as they stay the same, as they do under CUDA graphs once a few steps have been taken before the
capture.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from learnedopt.kernels.core.base import Backend, Case, Tensors
from learnedopt.kernels.means import (
    ADAM_LSTM,
    FORMS,
    SCHEDULE_FREE_LSTM,
    TakesMeans,
    statistics_from_sums,
    statistics_without_coordinates,
)
from learnedopt.kernels.core.state import LOW, SCALE
from learnedopt.rules import (
    AdamLSTMRule,
    LSTMRule,
    MetaLSTMRule,
    RNNpropRule,
    ScheduleFreeLSTMRule,
    State,
    UpdateRule,
)
from learnedopt.rules.recurrent import CoordinatewiseLSTM

CHUNK = 1024
"""Coordinates of one program."""
LARGEST = 64
"""Units of a layer at most: its tiles must stay in registers."""


class TritonBackend(Backend):
    """Triton kernels for the rules of this package, on CUDA; on the CPU under Triton's interpreter, to test them."""

    name: ClassVar[str] = "triton"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cuda" and not (case.device.type == "cpu" and _interpreted()):
            return f"it runs on CUDA, and the parameters are on {case.device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if case.dtype != torch.float32:
            return f"it computes in float32, and this takes {case.dtype}"
        # By exact type: a subclass may compute something else.
        if type(case.rule) not in _CODES:
            known = ", ".join(rule.__name__ for rule in _CODES)
            return f"it knows the rules {known}, and this is {type(case.rule).__name__}"
        lstm: CoordinatewiseLSTM | None = case.rule.lstm  # type: ignore[assignment]
        if lstm is not None and (units := lstm.hidden_size) > LARGEST:
            return f"it takes rules of up to {LARGEST} units, and this has {units}"
        return None

    def unprepared(self) -> str | None:
        return "Triton's interpreter is for tests" if _interpreted() else None

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        if not isinstance(rule, TakesMeans):
            return statistics_without_coordinates(rule, tensors, loss)
        form, settings = FORMS[type(rule)], _weights(rule).settings

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(form.sums, corrections.shape[1])
            work = _Work(rule, tensors)
            for launch in work.launches:
                parts = torch.empty(len(launch.chunks), form.sums, device=tensors.device)
                _kernels().sums_kernel[(len(parts),)](
                    work.table,
                    launch.chunks,
                    corrections,
                    len(tensors.params),
                    parts,
                    *(settings[name] for name in ("decay0", "decay1", "decay2", "rest0", "rest1", "eps")),
                    ScheduleFreeLSTMRule.way_limit,
                    RULE=settings["RULE"],
                    MAXIMIZE=tensors.maximize,
                    PARAM=launch.param,
                    GRAD=launch.grad,
                    CHUNK=CHUNK,
                    enable_fp_fusion=True,
                )
                # unsafe: lengths are not checked, which would be to wait for the device.
                totals += torch.segment_reduce(parts, "sum", lengths=launch.lengths, unsafe=True).T
            return totals

        with _on(tensors.device):
            return statistics_from_sums(rule, tensors, sums)

    def update(
        self,
        rule: UpdateRule,
        tensors: Tensors,
        statistics: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
        skip: Tensor | None,
    ) -> None:
        weights = _weights(rule)
        with _on(tensors.device):
            work = _Work(rule, tensors)
            block, warps = _at_once(weights.settings["LAYERS"])
            # Without layers nothing is kept in that dtype.
            state = tensors.states[0]["h"].dtype if weights.settings["LAYERS"] else torch.float32
            for launch in work.launches:
                _kernels().step_kernel[(len(launch.chunks),)](
                    work.table,
                    launch.chunks,
                    statistics.contiguous(),
                    len(tensors.params),
                    *weights.tensors,
                    lr if isinstance(lr, Tensor) else statistics,  # any address: it is not read
                    0.0 if isinstance(lr, Tensor) else float(lr),
                    float(weight_decay),
                    statistics if skip is None else skip.view(torch.uint8),
                    MAXIMIZE=tensors.maximize,
                    LR_IN_MEMORY=isinstance(lr, Tensor),
                    SKIP=skip is not None,
                    PARAM=launch.param,
                    GRAD=launch.grad,
                    STATE=_triton_dtype(state),
                    CHUNK=CHUNK,
                    BLOCK=block,
                    num_warps=warps,
                    num_stages=1,  # tiles are loaded once: there is nothing to load ahead
                    enable_fp_fusion=True,
                    **weights.settings,
                )
            work.write_back()


def _at_once(layers: int) -> tuple[int, int]:
    """Coordinates that a program works on at once, and its warps: tiles of units must stay in registers."""
    return (64, 8) if layers else (CHUNK, 4)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> Any:
    """The kernels' module; its import needs triton."""
    return importlib.import_module("learnedopt.kernels.triton_kernels")


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """What a kernel takes of a rule."""

    tensors: tuple[Tensor, ...]
    settings: dict[str, Any]


_READY: WeakKeyDictionary[UpdateRule, _Weights] = WeakKeyDictionary()


def _weights(rule: UpdateRule) -> _Weights:
    if rule not in _READY:
        assert isinstance(rule, LSTMRule | MetaLSTMRule | AdamLSTMRule | ScheduleFreeLSTMRule | RNNpropRule)
        _READY[rule] = _make_weights(rule)
    return _READY[rule]


def _pad(weight: Tensor, *sizes: int) -> Tensor:
    """Zeros after the ends of the last dimensions, to these sizes."""
    for dim, size in zip((-1, -2), reversed(sizes)):
        shape = list(weight.shape)
        shape[dim] = size - shape[dim]
        weight = torch.cat([weight, weight.new_zeros(shape)], dim=dim)
    return weight.contiguous()


def _lstm_weights(lstm: CoordinatewiseLSTM, padded: int, inputs: nn.Linear | None) -> tuple[Tensor, ...]:
    """What the kernel calls ``features``, ``recurrent``, ``below`` and ``biases``; ``inputs`` is RNNprop's layer."""

    def gates(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (4, lstm.hidden_size))

    def split(weights: Sequence[Tensor]) -> Tensor:
        """Square weights of each layer, in two float16 that add up to them."""
        whole = torch.stack([_pad(gates(weight), padded, padded) for weight in weights])
        high = whole.half()
        if not bool(high.isfinite().all()):
            raise ValueError("the backend 'triton' takes weights below 65504 only; ask for backend='reference'")
        return torch.stack([high, (whole - high).half()])

    recurrent = split(list(lstm.recurrent_weights))
    above = list(lstm.input_weights)[1:]
    features = gates(lstm.input_weights[0]).transpose(1, 2)
    if inputs is not None:
        above = list(lstm.input_weights)
        features = torch.cat([inputs.weight.T, inputs.bias.unsqueeze(0)])
    return (
        _pad(features, padded),
        recurrent,
        split(above) if above else recurrent,  # any address: it is not read
        torch.stack([_pad(gates(bias), padded) for bias in lstm.biases]),
    )


def _make_weights(rule: LSTMRule | MetaLSTMRule | AdamLSTMRule | ScheduleFreeLSTMRule | RNNpropRule) -> _Weights:
    lstm = rule.lstm
    units = lstm.hidden_size if lstm is not None else 0
    padded = max(16, 1 << max(units - 1, 0).bit_length())  # what triton takes as the side of a matrix
    first = next(rule.parameters())
    if lstm is not None:
        tensors = _lstm_weights(lstm, padded, rule.inputs if isinstance(rule, RNNpropRule) else None)
    else:
        none = first.new_zeros(1)
        tensors = (none, none.half(), none.half(), none)  # any addresses: they are not read
    settings: dict[str, Any] = {
        "RULE": _CODES[type(rule)],
        "LAYERS": lstm.num_layers if lstm is not None else 0,
        "UNITS": units,
        "PADDED": padded,
        "FEATURES": lstm.input_weights[0].shape[1] if lstm is not None else 0,
        "LOG_SIGN": True,
        "FEEDBACK_IS_GATE": False,
        **dict.fromkeys(("p", "scale", "decay0", "decay1", "decay2", "rest0", "rest1", "eps"), 1.0),
        **dict.fromkeys(("step_gain", "step_bound", "mix_bound", "averaging_bound", "interpolation"), 1.0),
    }

    def readout(weight: Tensor, others: Tensor, bias: Tensor) -> Tensor:
        """Units, three other inputs, and the bias, in a row for each output."""
        return torch.cat([_pad(weight, padded), others, bias.unsqueeze(1)], dim=1)

    match rule:
        case LSTMRule():
            none = first.new_zeros(1, 3)
            rows = readout(rule.readout.weight, none, rule.readout.bias)
            settings["LOG_SIGN"] = rule.config.preprocessing == "log_sign"
            settings.update(p=rule.config.preprocessing_p, scale=rule.config.output_scale)
        case MetaLSTMRule():
            none = first.new_zeros(1, 1)
            forget, input_ = rule.forget_gate, rule.input_gate
            of_forget, of_input = forget.weight[:, units:], input_.weight[:, units:]
            rows = torch.cat(
                [
                    readout(forget.weight[:, :units], torch.cat([of_forget, none], dim=1), forget.bias),
                    readout(
                        input_.weight[:, :units],
                        torch.cat([of_input[:, :1], none, of_input[:, 1:]], dim=1),
                        input_.bias,
                    ),
                ]
            )
            settings["FEEDBACK_IS_GATE"] = rule.config.gate_feedback == "gate"
            settings.update(p=rule.config.preprocessing_p, scale=rule.config.gradient_divisor)
        case AdamLSTMRule():
            rows = readout(rule.readout.weight, first.new_zeros(3, 3), rule.readout.bias)
            config = rule.config
            settings["LOG_SIGN"] = False
            settings.update(
                scale=config.nominal_step,
                decay0=config.fast_decay,
                decay1=config.slow_decay,
                decay2=config.square_decay,
                eps=config.eps,
                step_gain=config.log_step_gain,
                step_bound=config.log_step_bound,
                mix_bound=config.mix_bound,
            )
        case RNNpropRule():
            rows = readout(rule.readout.weight, first.new_zeros(1, 3), rule.readout.bias)
            settings["LOG_SIGN"] = False
            settings.update(
                scale=rule.config.output_scale,
                decay0=rule.config.momentum_decay,
                decay1=rule.config.square_decay,
                rest0=1.0 - rule.config.momentum_decay,
                rest1=1.0 - rule.config.square_decay,
                eps=rule.config.eps,
            )
        case ScheduleFreeLSTMRule():
            of_features, of_units = rule.readout.weight.split([rule.readout.in_features - units, units], dim=1)
            rows = readout(of_units, first.new_zeros(4, 3), rule.readout.bias)
            rows = torch.cat([rows.flatten(), of_features.flatten()])
            settings["LOG_SIGN"] = False
            settings.update(
                scale=rule.config.nominal_step,
                decay0=rule.config.momentum_decay,
                decay1=rule.config.square_decay,
                rest0=1.0 - rule.config.momentum_decay,
                rest1=1.0 - rule.config.square_decay,
                eps=rule.config.eps,
                step_gain=rule.config.log_step_gain,
                step_bound=rule.config.log_step_bound,
                mix_bound=rule.config.mix_bound,
                averaging_bound=rule.config.log_averaging_bound,
                interpolation=rule.config.interpolation,
            )
    return _Weights((*tensors, rows.contiguous()), settings)


_CODES: dict[type[UpdateRule], int] = {
    LSTMRule: 0,
    MetaLSTMRule: 1,
    AdamLSTMRule: 2,
    ScheduleFreeLSTMRule: 3,
    RNNpropRule: 4,
}
_NUMBERS: dict[type[UpdateRule], tuple[str, ...]] = {
    LSTMRule: (),
    MetaLSTMRule: ("forget", "input"),
    AdamLSTMRule: ADAM_LSTM.numbers,
    ScheduleFreeLSTMRule: SCHEDULE_FREE_LSTM.numbers,
    RNNpropRule: ("momentum", "square"),
}
"""The entries of the state that are one number per coordinate, in the order in which the kernels know them."""


# Tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Launch:
    """The tensors of one dtype."""

    param: Any
    grad: Any
    chunks: Tensor
    """``(programs, 2)``: tensor and first coordinate."""
    lengths: Tensor
    """``(tensors,)``: how many chunks each has here."""


class _Work:
    """The tensors of a step as the kernels take them."""

    def __init__(self, rule: UpdateRule, tensors: Tensors) -> None:
        self._params = tensors.params
        self._dense = [param.contiguous() for param in tensors.params]
        # Kept here: they must live until the kernel is launched.
        self._grads = [_readable(grad) for grad in tensors.grads]
        fields = ("h", "h" + SCALE, "c", "c" + LOW, "c" + SCALE, *_NUMBERS[type(rule)])
        rows = []
        for param, grad, state in zip(self._dense, self._grads, tensors.states):
            entries = [state[name].data_ptr() if name in state else 0 for name in fields]
            rows.append((param.data_ptr(), grad.data_ptr(), param.numel(), *entries, *[0] * (9 - len(entries))))
        stream = torch.cuda.current_stream(tensors.device).cuda_stream if tensors.device.type == "cuda" else 0
        self.table = _TABLES.on_device(tuple(rows), tensors.device, stream)
        dtypes = tuple((param.dtype, grad.dtype) for param, grad in zip(self._dense, self._grads))
        self.launches = _launches(tuple(param.numel() for param in self._dense), dtypes, tensors.device, CHUNK)

    def write_back(self) -> None:
        """To parameters whose elements are not in order in memory, from copies that are."""
        for param, dense in zip(self._params, self._dense):
            if dense is not param:
                param.copy_(dense)


def _readable(grad: Tensor) -> Tensor:
    return (grad if grad.dtype in _READABLE else grad.float()).contiguous()


_READABLE = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=64)
def _launches(
    sizes: tuple[int, ...], dtypes: tuple[tuple[torch.dtype, torch.dtype], ...], device: torch.device, chunk: int
) -> list[_Launch]:
    launches = []
    for pair in dict.fromkeys(dtypes):
        counts = [-(-size // chunk) if own == pair else 0 for size, own in zip(sizes, dtypes)]
        if not any(counts):
            continue
        tensor = torch.repeat_interleave(torch.tensor(counts))
        before = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        first = (torch.arange(len(tensor)) - before[tensor]) * chunk
        chunks = torch.stack([tensor, first], dim=1)
        param, grad = (_triton_dtype(dtype) for dtype in pair)
        launches.append(_Launch(param, grad, chunks.to(device), torch.tensor(counts).to(device)))
    return launches


class _Tables:
    """Tables of addresses, the last few that were used, and for ever those that a CUDA graph was captured with."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self._captured: list[tuple[Tensor, Tensor]] = []

    def on_device(self, rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
        key = rows, device, stream
        if key not in self._kept:
            host = torch.tensor(rows, dtype=torch.int64)
            if device.type == "cuda":
                host = host.pin_memory()  # from which the device copies while the host goes on
            self._kept[key] = host, host.to(device, non_blocking=True)
            if len(self._kept) > 64:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(self._kept[key])
        return self._kept[key][1]


_TABLES = _Tables()
