"""The fastest step on the CPU: a compiled pass over parameters, gradients and state, once over each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from learnedopt.kernels import blocks, extension
from learnedopt.kernels.base import Backend, Case, Tensors
from learnedopt.kernels.means import (
    ADAM_LSTM,
    FORMS,
    SCHEDULE_FREE_LSTM,
    TakesMeans,
    statistics_from_sums,
    statistics_without_coordinates,
)
from learnedopt.kernels.state import LOW, SCALE, state_layout
from learnedopt.rules import (
    AdamLSTMRule,
    LSTMRule,
    MetaLSTMRule,
    RNNpropRule,
    ScheduleFreeLSTMRule,
    State,
    UpdateRule,
)

_READABLE = (torch.float32, torch.bfloat16, torch.float16)
# Beyond it, what preprocessing takes for the least magnitude is no longer a normal float32.
_MOST_P = 80.0


class NativeBackend(Backend):
    """C++ for the rules of this package in float32, on tiles of coordinates that stay in the first-level cache."""

    name: ClassVar[str] = "native"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cpu":
            return f"it runs on the CPU, and the parameters are on {case.device}"
        if case.dtype != torch.float32:
            return f"it computes in float32, and this takes {case.dtype}"
        # By exact type: a subclass may compute something else.
        if type(case.rule) not in (LSTMRule, MetaLSTMRule, AdamLSTMRule, ScheduleFreeLSTMRule, RNNpropRule):
            return f"it knows the rules of this package, and this is {type(case.rule).__name__}"
        if getattr(case.rule.config, "preprocessing_p", 0.0) > _MOST_P:
            return f"it needs preprocessing_p to be at most {_MOST_P}"
        return None

    def unprepared(self) -> str | None:
        if not extension.is_compiled():
            return "it is not compiled on this machine: it will be when it is asked for by name"
        return extension.why_unavailable()

    def prepare(self) -> None:
        extension.operators()

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        if isinstance(rule, TakesMeans):
            return _statistics_from_means(rule, tensors)
        return statistics_without_coordinates(rule, tensors, loss)

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
        program = _program(rule)
        operator = getattr(extension.operators(), program.operator)
        for batch in _batches(rule, tensors):
            operator(
                batch.params,
                batch.grads,
                tensors.maximize,
                *(batch.entry(name) for name in ("h", "h" + SCALE, "c", "c" + LOW, "c" + SCALE)),
                program.weights,
                lr,
                weight_decay,
                *(batch.entry(name) for name in program.entries),
                *((batch.columns(statistics),) if program.entries else ()),
                *program.settings,
            )
            if lr:
                batch.write_params()


@dataclass(frozen=True)
class _Program:
    """A rule as its operator takes it."""

    operator: str
    weights: list[Tensor]
    entries: tuple[str, ...]
    """State beside the LSTM's. A rule that has any reads statistics too."""
    settings: tuple[Any, ...]


_PROGRAMS: WeakKeyDictionary[UpdateRule, _Program] = WeakKeyDictionary()


def _program(rule: UpdateRule) -> _Program:
    program = _PROGRAMS.get(rule)
    if program is None:
        program = _PROGRAMS[rule] = _make_program(rule)
    return program


def _make_program(rule: UpdateRule) -> _Program:
    assert isinstance(rule, LSTMRule | MetaLSTMRule | AdamLSTMRule | ScheduleFreeLSTMRule | RNNpropRule)
    weights = []
    if rule.lstm is not None:
        layers = zip(rule.lstm.input_weights, rule.lstm.recurrent_weights, rule.lstm.biases)
        weights = [weight.detach().contiguous() for layer in layers for weight in layer]

    def linear(layer: torch.nn.Linear) -> tuple[Tensor, Tensor]:
        return layer.weight.detach().contiguous(), layer.bias.detach().contiguous()

    settings: tuple[Any, ...]
    match rule:
        case LSTMRule():
            preprocess = rule.config.preprocessing == "log_sign"
            settings = (*linear(rule.readout), preprocess, rule.config.preprocessing_p, rule.config.output_scale)
            return _Program("lstm_step", weights, (), settings)
        case AdamLSTMRule():
            bounds = (rule.config.log_step_gain, rule.config.log_step_bound, rule.config.mix_bound)
            settings = (*linear(rule.readout), *_averaging(rule), rule.config.nominal_step, *bounds)
            return _Program("adam_lstm_step", weights, ADAM_LSTM.numbers, settings)
        case ScheduleFreeLSTMRule():
            # In the order in which the kernel reads it.
            readout = torch.cat([rule.readout.weight.T, rule.readout.bias.unsqueeze(0)]).detach()
            steps = (rule.config.nominal_step, rule.config.interpolation)
            bounds = (rule.config.log_step_gain, rule.config.log_step_bound, rule.config.mix_bound)
            settings = (readout, *_averaging(rule), *steps, *bounds, rule.config.log_averaging_bound)
            return _Program("schedule_free_lstm_step", weights, SCHEDULE_FREE_LSTM.numbers, settings)
        case RNNpropRule():
            settings = (*linear(rule.inputs), *linear(rule.readout), *_averaging(rule), rule.config.output_scale)
            return _Program("rnnprop_step", weights, ("momentum", "square"), settings)
        case MetaLSTMRule():
            config = rule.config
            gates = (*linear(rule.forget_gate), *linear(rule.input_gate))
            settings = (*gates, config.preprocessing_p, config.gradient_divisor, config.gate_feedback == "gate")
            return _Program("meta_lstm_step", weights, ("forget", "input"), settings)


def _averaging(rule: TakesMeans | RNNpropRule) -> tuple[float, ...]:
    """What a rule's moving averages are made with."""
    match rule:
        case AdamLSTMRule():
            return rule.config.fast_decay, rule.config.slow_decay, rule.config.square_decay, rule.config.eps
        case ScheduleFreeLSTMRule() | RNNpropRule():
            return rule.config.momentum_decay, rule.config.square_decay, rule.config.eps


def _statistics_from_means(rule: TakesMeans, tensors: Tensors) -> tuple[Tensor, State]:
    """What the rule's ``statistics`` gives, its sums taken in one pass."""
    form, operators = FORMS[type(rule)], extension.operators()
    operator, settings = operators.adam_lstm_sums, _averaging(rule)
    if isinstance(rule, ScheduleFreeLSTMRule):
        operator, settings = operators.schedule_free_lstm_sums, (*settings, rule.way_limit)

    def sums(corrections: Tensor) -> Tensor:
        totals = torch.zeros(form.sums, len(tensors.params), dtype=torch.float64)
        for batch in _batches(rule, tensors):
            entries = (batch.entry(name) for name in form.numbers)
            totals[:, batch.indices] += operator(
                batch.params, batch.grads, tensors.maximize, *entries, batch.columns(corrections), *settings
            )
        return totals.to(tensors.dtype)

    return statistics_from_sums(rule, tensors, sums)


@dataclass(frozen=True)
class _Batch:
    """Tensors that one call works on: parameters and gradients are contiguous, of dtypes that the kernel reads."""

    indices: list[int]
    """Which of the step's tensors they are, or are of."""
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    originals: list[Tensor]
    """What ``params`` are copies of; empty where they are the parameters themselves."""

    def entry(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states if name in state]

    def columns(self, statistics: Tensor) -> Tensor:
        """The statistics of these tensors."""
        return (statistics if len(self.indices) == statistics.shape[1] else statistics[:, self.indices]).contiguous()

    def write_params(self) -> None:
        for original, param in zip(self.originals, self.params):
            original.copy_(param.view_as(original))


def _batches(rule: UpdateRule, tensors: Tensors) -> Iterator[_Batch]:
    """All that can be worked on where it is, in one batch; the others cut into pieces and copied."""
    direct: list[int] = []
    copied: list[int] = []
    for index, (param, grad) in enumerate(zip(tensors.params, tensors.grads)):
        in_order = param.is_contiguous() and grad.is_contiguous()
        readable = param.dtype in _READABLE and grad.dtype in _READABLE
        (direct if in_order and readable else copied).append(index)
    if not copied:
        yield _Batch(direct, list(tensors.params), list(tensors.grads), list(tensors.states), [])
        return
    if direct:
        here = tensors.select(direct)
        yield _Batch(direct, list(here.params), list(here.grads), list(here.states), [])
    layout = state_layout(rule, tensors.dtype, tensors.state_dtype)
    lead = {name: spec.shape for name, spec in layout.items() if spec.scope == "coordinate"}
    for index in copied:
        state = {name: tensors.states[index][name].view(*shape, -1) for name, shape in lead.items()}
        for param, grad, start in blocks.pieces(tensors.params[index], tensors.grads[index], blocks.BLOCK):
            part = slice(start, start + param.numel())
            yield _Batch(
                [index],
                [param.to(tensors.dtype, copy=True, memory_format=torch.contiguous_format)],
                [grad.to(tensors.dtype).contiguous()],
                [{name: values[..., part] for name, values in state.items()}],
                [param],
            )
