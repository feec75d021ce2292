"""Fast on the CPU without a compiler: the rules of this package, written out in place on blocks that fit the cache.

Where a rule allocates every intermediate result, here each has its place in a workspace. A layer is one matrix product,
of its weights and bias side by side with inputs, hidden state and ones on top of each other. Cell states in the dtype
that is computed in are updated where they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from learnedopt.kernels import blocks
from learnedopt.kernels.adam_lstm import CORRECTIONS, MOMENTS, statistics_from_sums
from learnedopt.kernels.base import Backend, Case, Tensors
from learnedopt.kernels.state import CODES, SCALE, SMALLEST
from learnedopt.kernels.workspace import WORKSPACE, Sizes, Views
from learnedopt.rules import AdamLSTMRule, LSTMRule, MetaLSTMRule, Segments, State, UpdateRule
from learnedopt.rules.recurrent import CoordinatewiseLSTM


class BlockedBackend(Backend):
    """In-place operations of plain torch for the rules of this package, on the CPU."""

    name: ClassVar[str] = "blocked"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cpu":
            return f"it runs on the CPU, and the parameters are on {case.device}"
        # By exact type: a subclass may compute something else.
        if type(case.rule) not in _PROGRAMS:
            known = ", ".join(rule.__name__ for rule in _PROGRAMS)
            return f"it knows the rules {known}, and this is {type(case.rule).__name__}"
        return None

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        return _program(rule).statistics(rule, tensors, loss)

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
        for block in program.blocks(tensors):
            delta = program.delta(block, statistics)
            if lr:
                param = block.views.param
                if weight_decay:
                    param.mul_(1.0 - lr * weight_decay)
                block.write_param(param.add_(delta, alpha=float(lr)))


# Blocks ------------------------------------------------------------------------------------------------------------

Entries = dict[str, tuple[Tensor, ...]]
"""A tensor's coordinate-scope state as matrices: one ``(H, N)`` per layer of a vector, one ``(1, N)`` of a number."""


class Part:
    """A stretch of one tensor's coordinates, and its place in a block."""

    def __init__(self, index: int, param: Tensor, grad: Tensor, start: int, entries: Entries, place: slice) -> None:
        self.index, self.param, self.grad, self.place = index, param, grad, place
        self._start, self._entries = start, entries

    def entry(self, name: str, layer: int) -> Tensor:
        return self._entries[name][layer].narrow(1, self._start, self.param.numel())


class Block:
    """Coordinates side by side, of one large tensor or of several small ones, and the workspace for them."""

    def __init__(self, parts: list[Part], views: Views, maximize: bool) -> None:
        self.parts, self.views = parts, views
        for part in parts:
            views.param[0, part.place].view(part.param.shape).copy_(part.param)
            views.grad[0, part.place].view(part.grad.shape).copy_(part.grad)
        if maximize:
            views.grad.neg_()

    def write_param(self, values: Tensor) -> None:
        for part in self.parts:
            part.param.copy_(values[0, part.place].view(part.param.shape))

    def read(self, name: str, layer: int, out: Tensor) -> None:
        """Fetch an entry of the state."""
        for part, room in self._chunks(out):
            kept = part.entry(name, layer)
            room.copy_(kept)
        if kept.dtype == torch.int8:
            self.read(name + SCALE, layer, self.views.scale)
            out.mul_(torch.abs(out, out=self.views.scratch)).mul_(self.views.scale.div_(CODES**2))

    def open(self, name: str, layer: int, room: Tensor) -> Tensor:
        """An entry of the state to work on: itself where it can be written to, else a copy in ``room``."""
        if len(self.parts) == 1:
            kept = self.parts[0].entry(name, layer)
            if kept.dtype == room.dtype:
                return kept
        self.read(name, layer, room)
        return room

    def write(self, name: str, layer: int, values: Tensor) -> None:
        """Keep new values of an entry."""
        if self.parts[0].entry(name, layer).dtype == torch.int8:
            scale, codes = self.views.scale, torch.abs(values, out=self.views.scratch)
            torch.amax(codes, dim=0, keepdim=True, out=scale)
            self.write(name + SCALE, layer, scale)
            self.read(name + SCALE, layer, scale)  # as it was rounded
            codes.mul_(scale.clamp_(min=SMALLEST).reciprocal_().mul_(CODES**2)).sqrt_().round_()
            values = torch.copysign(codes, values, out=codes)
        for part, chunk in self._chunks(values):
            kept = part.entry(name, layer)
            if kept.data_ptr() != chunk.data_ptr():  # else it was opened, and changed where it is
                kept.copy_(chunk)

    def of_tensors(self, columns: Tensor, room: Tensor) -> Tensor:
        """Numbers of each tensor, ``(K, S)``, for each coordinate: ``(K, n)``, or ``(K, 1)`` if all are alike."""
        if len(self.parts) == 1:
            return columns.narrow(1, self.parts[0].index, 1)
        for part, chunk in self._chunks(room):
            chunk.copy_(columns.narrow(1, part.index, 1))
        return room

    def add_to(self, values: Tensor, sums: Tensor) -> None:
        """Add values ``(K, n)`` up over each tensor, ``(K, S)``."""
        for part, chunk in self._chunks(values):
            sums[:, part.index] += chunk.sum(1)

    def _chunks(self, values: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """The columns of each part."""
        if len(self.parts) == 1:
            yield self.parts[0], values
        else:
            for part in self.parts:
                yield part, values[:, part.place]


# Rules -------------------------------------------------------------------------------------------------------------


class Program(ABC):
    """A rule made ready: weights packed, sizes known."""

    def __init__(self, rule: UpdateRule, lstm: CoordinatewiseLSTM, extra: int, outputs: int, scalars: int) -> None:
        self._spec = {name: spec for name, spec in rule.state_spec().items() if spec.scope == "coordinate"}
        i, f, g, o = torch.arange(4 * lstm.hidden_size).chunk(4)
        order = torch.cat([i, f, o, g])  # the sigmoids together
        layers = zip(lstm.input_weights, lstm.recurrent_weights, lstm.biases)
        self._weights = [torch.cat([w, r, b.unsqueeze(1)], dim=1)[order] for w, r, b in layers]
        self._dtype = self._weights[0].dtype
        features = lstm.input_weights[0].shape[1]
        self._sizes = Sizes(features, lstm.hidden_size, lstm.num_layers, extra, outputs, scalars)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        """As :meth:`Backend.statistics`."""
        return torch.empty(0, len(tensors.params), dtype=tensors.dtype), {}

    @abstractmethod
    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        """Advance the state of a block; the change of its parameters, ``(1, n)``."""

    def blocks(self, tensors: Tensors) -> Iterator[Block]:
        """All coordinates, each in one block, with parameters and gradients in the workspace."""
        entries = [self._entries(state) for state in tensors.states]
        pieces = [
            (index, *piece)
            for index, (param, grad) in enumerate(zip(tensors.params, tensors.grads))
            for piece in blocks.pieces(param, grad, self._sizes.block)
            if param.numel()
        ]
        for bundle in blocks.bundles([param.numel() for _, param, _, _ in pieces], self._sizes.block):
            parts, stop = [], 0
            for index, param, grad, start in (pieces[i] for i in bundle):
                place = slice(stop, stop := stop + param.numel())
                parts.append(Part(index, param, grad, start, entries[index], place))
            yield Block(parts, WORKSPACE.views(self._sizes, self._dtype, stop), tensors.maximize)

    def _entries(self, state: State) -> Entries:
        entries = {}
        for name, spec in self._spec.items():
            layers, rows = spec.shape or (1, 1)
            size = state[name].numel() // (layers * rows)
            entries[name] = state[name].view(layers, rows, size).unbind(0)
            if state[name].dtype == torch.int8:
                entries[name + SCALE] = state[name + SCALE].view(layers, 1, size).unbind(0)
        return entries

    def run_lstm(self, block: Block) -> None:
        """All layers, from the features to ``top``."""
        v = block.views
        for layer, weights in enumerate(self._weights):
            block.read("h", layer, v.hidden[layer])
            torch.mm(weights, v.inputs[layer], out=v.gates)
            v.sigmoids.sigmoid_()
            v.tanhs.tanh_()
            cell = block.open("c", layer, v.cell)
            cell.mul_(v.forget).addcmul_(v.input, v.tanhs)
            torch.mul(v.output, torch.tanh(cell, out=v.scratch), out=v.outputs[layer])
            block.write("c", layer, cell)
            block.write("h", layer, v.outputs[layer])


class LSTMProgram(Program):
    """:class:`~learnedopt.rules.LSTMRule`."""

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__(rule, rule.lstm, extra=0, outputs=1, scalars=0)
        self._config = rule.config
        self._readout = rule.config.output_scale * torch.cat([rule.readout.weight, rule.readout.bias.unsqueeze(1)], 1)

    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        v = block.views
        if self._config.preprocessing == "log_sign":
            _log_sign(v.grad, self._config.preprocessing_p, v.features)
        else:
            v.features.copy_(v.grad)
        self.run_lstm(block)
        return torch.mm(self._readout, v.top, out=v.out)


class MetaLSTMProgram(Program):
    """:class:`~learnedopt.rules.MetaLSTMRule`; ``top`` has the parameters and both feedbacks beside the layer."""

    def __init__(self, rule: MetaLSTMRule) -> None:
        super().__init__(rule, rule.lstm, extra=3, outputs=2, scalars=0)
        self._config = rule.config
        none = torch.zeros(1, 1, dtype=self._dtype)
        forget, input_ = rule.forget_gate, rule.input_gate
        self._gates = torch.cat(
            [
                torch.cat([forget.weight, none, forget.bias.unsqueeze(1)], dim=1),
                torch.cat([input_.weight[:, :-1], none, input_.weight[:, -1:], input_.bias.unsqueeze(1)], dim=1),
            ]
        )

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        none = torch.empty(0, dtype=tensors.dtype)
        return rule.statistics(none, none, {}, Segments([0] * len(tensors.params)), loss)

    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        grad = v.grad.div_(config.gradient_divisor)
        _log_sign(grad, config.preprocessing_p, v.features[:2])
        v.features[2:].copy_(block.of_tensors(statistics, v.features[2:]))
        self.run_lstm(block)
        param, *feedback = v.top[-4:-1].split(1)
        param.copy_(v.param)
        for name, row in zip(("forget", "input"), feedback):
            block.read(name, 0, row)
        gates = torch.mm(self._gates, v.top, out=v.out)
        values = torch.sigmoid(gates, out=v.top[-3:-1])
        for name, row in zip(("forget", "input"), (values if config.gate_feedback == "gate" else gates).split(1)):
            block.write(name, 0, row)
        forget, input_ = values.split(1)
        return forget.sub_(1.0).mul_(param).addcmul_(input_, grad, value=-1.0)


class AdamLSTMProgram(Program):
    """:class:`~learnedopt.rules.AdamLSTMRule`."""

    def __init__(self, rule: AdamLSTMRule) -> None:
        super().__init__(rule, rule.lstm, extra=0, outputs=3, scalars=7)
        self._config = rule.config
        self._readout = torch.cat([rule.readout.weight, rule.readout.bias.unsqueeze(1)], dim=1)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, AdamLSTMRule)

        def sums(corrections: Tensor) -> Tensor:
            totals = torch.zeros_like(corrections)
            for block in self.blocks(tensors):
                v = block.views
                moments = v.scalars[:3].split(1)  # not the state's own: it has not moved yet
                for name, row in zip(MOMENTS, moments):
                    block.read(name, 0, row)
                a, b, g = self._directions(block, corrections, moments)
                torch.mul(v.param, v.param, out=v.out[:1])
                torch.mul(a, g, out=v.out[1:2])
                torch.mul(b, b, out=v.out[2:])
                block.add_to(v.out, totals)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        moments = [block.open(name, 0, row) for name, row in zip(MOMENTS, v.scalars[:3].split(1))]
        a, b, _ = self._directions(block, statistics, moments)
        for name, row in zip(MOMENTS, moments):
            block.write(name, 0, row)
        torch.abs(v.features[:2], out=v.features[3:5])
        shared = v.features[5:]
        shared.copy_(block.of_tensors(statistics[CORRECTIONS:], shared))
        self.run_lstm(block)
        out = torch.mm(self._readout, v.top, out=v.out)
        step, mix = out[:1], out[1:]
        step.mul_(config.log_step_gain / config.log_step_bound).tanh_().mul_(config.log_step_bound).exp_()
        mix.div_(config.mix_bound).tanh_().mul_(config.mix_bound)
        mix[:1].add_(1.0).mul_(a).addcmul_(mix[1:], b)
        return step.mul_(mix[:1]).mul_(-config.nominal_step)

    def _directions(self, block: Block, statistics: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
        """Advance the moments; both momenta and the gradient over the running RMS, the first three features."""
        v, config = block.views, self._config
        limits = torch.finfo(self._dtype)
        limit = 0.5 * math.sqrt(limits.max)
        grad = v.grad.clamp_(-limit, limit)
        fast, slow, square = moments
        torch.lerp(grad, fast, config.fast_decay, out=fast)
        torch.lerp(grad, slow, config.slow_decay, out=slow)
        rms = v.scalars[6:]
        torch.lerp(torch.mul(grad, grad, out=rms), square, config.square_decay, out=square)
        corrections = block.of_tensors(statistics[:CORRECTIONS], v.scalars[3:6]).split(1)
        torch.mul(square, corrections[2], out=rms).clamp_(min=limits.tiny).sqrt_().add_(config.eps)
        directions = list(v.features[:3].split(1))
        for moment, correction, direction in zip((fast, slow), corrections, directions):
            torch.mul(moment, correction, out=direction).div_(rms)
        torch.div(grad, rms, out=directions[2])
        return directions


def _log_sign(x: Tensor, p: float, out: Tensor) -> None:
    """:func:`~learnedopt.rules.log_sign` of ``(1, n)`` into ``(2, n)``."""
    torch.abs(x, out=out[:1]).clamp_(min=math.exp(-p)).log_().div_(p).clamp_(min=-1.0)
    torch.mul(x, math.exp(p), out=out[1:]).clamp_(-1.0, 1.0)


_PROGRAMS: dict[type[UpdateRule], Callable[[Any], Program]] = {
    LSTMRule: LSTMProgram,
    MetaLSTMRule: MetaLSTMProgram,
    AdamLSTMRule: AdamLSTMProgram,
}
_READY: WeakKeyDictionary[UpdateRule, Program] = WeakKeyDictionary()


def _program(rule: UpdateRule) -> Program:
    """A rule's program, made once."""
    if rule not in _READY:
        _READY[rule] = _PROGRAMS[type(rule)](rule)
    return _READY[rule]
