"""The fastest step on the CPU: a compiled pass over parameters, gradients and state, once over each.

A rule's folder has a ``native.h`` with its operators (``core/step.h`` says of what they are made) and a
:class:`Program` that hands them the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from learnedopt.kernels.core import blocks, extension, registry
from learnedopt.kernels.core.base import Backend, Case, StepOptions, Tensors
from learnedopt.kernels.core.means import TakesMeans, statistics_from_sums, statistics_without_coordinates
from learnedopt.kernels.core.state import LOW, SCALE, state_layout
from learnedopt.rules.base import State, UpdateRule
from learnedopt.rules.recurrent import CoordinatewiseLSTM

_READABLE = (torch.float32, torch.bfloat16, torch.float16)
_OF_LSTM = ("h", "h" + SCALE, "c", "c" + LOW, "c" + SCALE)
_MOST_P = 80.0


class NativeBackend(Backend):
    """C++ for rules that have a program, in float32, on tiles of coordinates that stay in the first-level cache."""

    name: ClassVar[str] = "native"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cpu":
            return f"it runs on the CPU, and the parameters are on {case.device}"
        if case.dtype != torch.float32:
            return f"it computes in float32, and this takes {case.dtype}"
        return registry.refusal(self.name, case.rule)

    def unprepared(self) -> str | None:
        return extension.why_unavailable() if extension.is_compiled() else extension.compile_in_background()

    def prepare(self) -> None:
        extension.operators()

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        program: Program = registry.program(self.name, rule)
        return program.statistics(rule, tensors, loss)

    def update(self, rule: UpdateRule, tensors: Tensors, statistics: Tensor, options: StepOptions) -> None:
        program: Program = registry.program(self.name, rule)
        operator = getattr(extension.operators(), f"{program.operator}_step")
        for batch in _batches(rule, tensors):
            operator(
                batch.params,
                batch.grads,
                *batch.state(program.entries),
                program.network,
                program.weights,
                batch.columns(statistics),
                program.settings,
                options.lr,
                options.weight_decay,
                tensors.maximize,
            )
            if options.lr:
                batch.write_params()


class Program:
    """A rule as its operators take it.

    Args:
        lstm: Of a rule that has one.
        weights: The other weights, in the order in which the rule's ``native.h`` takes them.
        settings: Of the type :attr:`settings_type`.
    """

    operator: ClassVar[str]
    """What the names of its operators begin with."""
    entries: ClassVar[tuple[str, ...]] = ()
    """State that a step has besides an LSTM's."""
    settings_type: ClassVar[type[NamedTuple]]
    """A named tuple of floats, which is ``Settings`` in C++, of doubles."""
    rows: ClassVar[type[IntEnum] | None] = None
    """Names of the rows of the statistics, which are constants in C++, as is their number, ``NUM_ROWS``."""
    means: ClassVar[type[IntEnum] | None] = None
    """The same for what the rule takes the means of, with ``NUM_MEANS``; ``None`` where it takes none."""
    entries_of_sums: ClassVar[tuple[str, ...]] = ()
    """State that the means are taken of."""

    def __init__(self, lstm: CoordinatewiseLSTM | None, weights: Sequence[Tensor], settings: Sequence[float]) -> None:
        layers = () if lstm is None else zip(lstm.input_weights, lstm.recurrent_weights, lstm.biases)
        self.network = [weight.detach().contiguous() for layer in layers for weight in layer]
        self.weights = [weight.detach().contiguous() for weight in weights]
        self.settings = [float(value) for value in settings]

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        """Why it cannot serve a rule, as the end of a sentence; ``None`` where it can."""
        return None

    @classmethod
    def declarations(cls) -> Iterator[str]:
        """In C++, the names that this file gives to rows, means and settings."""
        for name, names in (("ROWS", cls.rows), ("MEANS", cls.means)):
            if names is not None:
                members = [f"{member} = {int(value)}" for member, value in names.__members__.items()]
                yield f"enum {{ {', '.join(members)}, NUM_{name} = {len(names)} }};"
        fields = cls.settings_type._fields
        values = ", ".join(f"{field}(values.at({index}))" for index, field in enumerate(fields))
        yield f"struct Settings {{ double {', '.join(fields)};"
        yield f"  explicit Settings(const std::vector<double>& values) : {values} {{}} }};"

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        """What the rule's ``statistics`` gives, its sums taken in one pass."""
        if self.means is None:
            return statistics_without_coordinates(rule, tensors, loss)
        operator, rows = getattr(extension.operators(), f"{self.operator}_sums"), len(self.means)

        def sums(corrections: Tensor) -> Tensor:
            totals = torch.zeros(rows, len(tensors.params), dtype=torch.float64)
            for batch in _batches(rule, tensors):
                totals[:, batch.indices] += operator(
                    batch.params,
                    batch.grads,
                    batch.own_grads,
                    *batch.state(self.entries_of_sums),
                    batch.columns(corrections),
                    self.settings,
                    tensors.maximize,
                )
            return totals.to(tensors.dtype)

        taking: TakesMeans = rule  # type: ignore[assignment]
        return statistics_from_sums(taking, tensors, sums)


def too_steep(p: float) -> str | None:
    """A refusal of rules whose preprocessing takes what is no longer a normal float32 for the least magnitude."""
    return f"it needs preprocessing_p to be at most {_MOST_P}" if p > _MOST_P else None


def linear(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """What C++ makes a ``Readout`` of."""
    return layer.weight, layer.bias


@dataclass(frozen=True)
class _Batch:
    """Tensors that one call works on: parameters and gradients are contiguous, of dtypes that the kernel reads."""

    indices: list[int]
    """Which of the step's tensors they are, or are of."""
    params: list[Tensor]
    grads: list[Tensor]
    own_grads: list[Tensor]
    """Empty where they are the gradients themselves."""
    states: list[State]
    originals: list[Tensor]
    """What ``params`` are copies of; empty where they are the parameters themselves."""

    def state(self, entries: Sequence[str]) -> tuple[list[Tensor], list[str]]:
        """An LSTM's entries and others as operators take them: tensors entry by entry, and the entries' names."""
        kept = self.states[0] if self.states else {}
        names = [*(name for name in _OF_LSTM if name in kept), *entries]
        return [state[name] for name in names for state in self.states], names

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
    own_grads = [] if tensors.own_grads is None else list(tensors.own_grads)
    for index, (param, *grads) in enumerate(zip(tensors.params, tensors.grads, own_grads or tensors.grads)):
        readable = all(x.is_contiguous() and x.dtype in _READABLE for x in (param, *grads))
        (direct if readable else copied).append(index)
    if not copied:
        yield _Batch(direct, list(tensors.params), list(tensors.grads), own_grads, list(tensors.states), [])
        return
    if direct:
        here = tensors.select(direct)
        own = [] if here.own_grads is None else list(here.own_grads)
        yield _Batch(direct, list(here.params), list(here.grads), own, list(here.states), [])
    layout = state_layout(rule, tensors.dtype, tensors.state_dtype)
    lead = {name: spec.shape for name, spec in layout.items() if spec.scope == "coordinate"}
    for index in copied:
        state = {name: tensors.states[index][name].view(*shape, -1) for name, shape in lead.items()}
        together = [tensors.params[index], tensors.grads[index], *([own_grads[index]] if own_grads else [])]
        for (param, grad, *own), start in blocks.pieces(together, blocks.BLOCK):
            part = slice(start, start + param.numel())
            yield _Batch(
                [index],
                [param.to(tensors.dtype, copy=True, memory_format=torch.contiguous_format)],
                [grad.to(tensors.dtype).contiguous()],
                [x.to(tensors.dtype).contiguous() for x in own],
                [{name: values[..., part] for name, values in state.items()}],
                [param],
            )
