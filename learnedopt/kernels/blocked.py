"""Fast on the CPU without a compiler: the rules of this package, written out in place on blocks of reused memory.

Where a rule allocates every intermediate result, here each has its place in a workspace. A layer is one matrix product,
of its weights and bias side by side with inputs, hidden state and ones on top of each other. Cell states in the dtype
that is computed in are updated where they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from learnedopt.kernels import blocks
from learnedopt.kernels.base import Backend, Case, Tensors
from learnedopt.kernels.means import (
    ADAM_LSTM,
    SCHEDULE_FREE_LSTM,
    statistics_from_sums,
    statistics_without_coordinates,
)
from learnedopt.kernels.state import CODES, FINE_CODES, LOW, PER_BYTE, SCALE, SMALLEST
from learnedopt.kernels.workspace import WORKSPACE, Sizes, Views
from learnedopt.rules import (
    AdamLSTMRule,
    LSTMRule,
    MetaLSTMRule,
    RNNpropConfig,
    RNNpropRule,
    ScheduleFreeLSTMConfig,
    ScheduleFreeLSTMRule,
    State,
    UpdateRule,
)
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


class Part:
    """A stretch of one tensor's coordinates, and the state of the whole tensor."""

    def __init__(self, index: int, param: Tensor, grad: Tensor, start: int, size: int, state: State) -> None:
        self.index, self.param, self.grad, self.state = index, param, grad, state
        self._start, self._size = start, size

    def entry(self, name: str, layer: int, layers: int) -> Tensor:
        """What is kept of an entry as a matrix: ``(H, n)`` of one layer of a vector, ``(1, n)`` of a number."""
        whole = self.state[name].view(layers, -1, self._size)[layer]
        count = self.param.numel()
        return whole if count == self._size else whole.narrow(1, self._start, count)


class Block:
    """Coordinates side by side, of one large tensor or of several small ones, and the workspace for them."""

    def __init__(self, parts: list[Part], views: Views, layers: Mapping[str, int], maximize: bool) -> None:
        self.parts, self.views = parts, views
        self._layers = layers
        self._counts = [part.param.numel() for part in parts]
        self._entries: dict[tuple[str, int], list[Tensor]] = {}
        for part, param, grad in zip(parts, self._chunks(views.param), self._chunks(views.grad)):
            param.view(part.param.shape).copy_(part.param)
            grad.view(part.grad.shape).copy_(part.grad)
        if maximize:
            views.grad.neg_()

    def write_param(self, values: Tensor) -> None:
        for part, chunk in zip(self.parts, self._chunks(values)):
            part.param.copy_(chunk.view(part.param.shape))

    def entries(self, name: str, layer: int) -> list[Tensor]:
        """What each part keeps of an entry; made once, as many small tensors take longer to look up than to read."""
        found = self._entries.get((name, layer))
        if found is None:
            found = [part.entry(name, layer, self._layers[name]) for part in self.parts]
            self._entries[name, layer] = found
        return found

    def read(self, name: str, layer: int, out: Tensor) -> None:
        """Fetch an entry of the state."""
        kept = self.entries(name, layer)
        if len(kept) > 1 and kept[0].dtype == out.dtype:
            torch.cat(kept, dim=1, out=out)
        else:  # one by one: a concatenation takes longer for one, and converts into memory of its own first
            for values, room in zip(kept, self._chunks(out)):
                room.copy_(values)
        if kept[0].dtype == torch.int8:
            most: float = CODES
            if self._is_fine(name):
                most = FINE_CODES / PER_BYTE
                self._read_low(name + LOW, layer, out)
            self.read(name + SCALE, layer, self.views.scale)
            out.mul_(torch.abs(out, out=self.views.scratch)).mul_(self.views.scale.div_(most**2))

    def _is_fine(self, name: str) -> bool:
        return name + LOW in self.parts[0].state

    def _read_low(self, name: str, layer: int, codes: Tensor) -> None:
        """Add the lower bits of codes to the upper ones, of which a unit is their whole."""
        low, digits = self.views.low, self.views.digits
        self.read(name, layer, low)
        for unit in reversed(range(1, PER_BYTE)):
            torch.mul(low, 1.0 / PER_BYTE**unit, out=digits).floor_()
            low.sub_(digits, alpha=PER_BYTE**unit)
            rows = codes[unit::PER_BYTE]
            rows.add_(digits[: len(rows)], alpha=1.0 / PER_BYTE)
        codes[::PER_BYTE].add_(low, alpha=1.0 / PER_BYTE)

    def open(self, name: str, layer: int, room: Tensor) -> Tensor:
        """An entry of the state to work on: itself where it can be written to, else a copy in ``room``."""
        kept = self.entries(name, layer)
        if len(kept) == 1 and kept[0].dtype == room.dtype:
            return kept[0]
        self.read(name, layer, room)
        return room

    def write(self, name: str, layer: int, values: Tensor) -> None:
        """Keep new values of an entry."""
        entries = self.entries(name, layer)
        if entries[0].dtype == torch.int8:
            scale, codes = self.views.scale, torch.abs(values, out=self.views.scratch)
            torch.amax(codes, dim=0, keepdim=True, out=scale)
            self.write(name + SCALE, layer, scale)
            self.read(name + SCALE, layer, scale)  # as it was rounded
            fine = self._is_fine(name)
            most = FINE_CODES if fine else CODES
            codes.mul_(scale.clamp_(min=SMALLEST).reciprocal_().mul_(most**2)).sqrt_().round_()
            # Not copysign, which takes longer than all of this together.
            values = codes.clamp_(max=most).mul_(torch.sign(values, out=self.views.spare))
            if fine:
                values = torch.mul(codes, 1.0 / PER_BYTE, out=self.views.spare).floor_()
                self._write_low(name + LOW, layer, codes.sub_(values, alpha=PER_BYTE))
        for kept, chunk in zip(entries, self._chunks(values)):
            if kept is not chunk:  # else it was opened, and changed where it is
                kept.copy_(chunk)

    def _write_low(self, name: str, layer: int, digits: Tensor) -> None:
        """Keep the lower bits of codes."""
        low = self.views.low.copy_(digits[::PER_BYTE])
        for unit in range(1, PER_BYTE):
            rows = digits[unit::PER_BYTE]
            low[: len(rows)].add_(rows, alpha=PER_BYTE**unit)
        self.write(name, layer, low)

    def of_tensors(self, columns: Tensor, room: Tensor) -> Tensor:
        """Numbers of each tensor, ``(K, S)``, for each coordinate: ``(K, n)``, or ``(K, 1)`` if all are alike."""
        own = [columns.narrow(1, part.index, 1) for part in self.parts]
        if len(own) == 1:
            return own[0]
        return torch.cat([column.expand(-1, count) for column, count in zip(own, self._counts)], dim=1, out=room)

    def add_to(self, values: Tensor, sums: Tensor) -> None:
        """Add values ``(K, n)`` up over each tensor, ``(K, S)``."""
        indices = torch.tensor([part.index for part in self.parts])
        sums.index_add_(1, indices, torch.stack([chunk.sum(1) for chunk in self._chunks(values)], dim=1))

    def _chunks(self, values: Tensor) -> Sequence[Tensor]:
        """The columns of each part."""
        return (values,) if len(self.parts) == 1 else values.split(self._counts, dim=1)


# Rules -------------------------------------------------------------------------------------------------------------


class Program(ABC):
    """A rule made ready: weights packed, sizes known."""

    def __init__(
        self,
        rule: UpdateRule,
        lstm: CoordinatewiseLSTM | None,
        features: int,
        *,
        extra: int = 0,
        outputs: int,
        scalars: int = 0,
    ) -> None:
        spec = {name: spec.shape[:1] for name, spec in rule.state_spec().items() if spec.scope == "coordinate"}
        self._layers = {name + part: math.prod(shape) for name, shape in spec.items() for part in ("", LOW, SCALE)}
        self._dtype = next(rule.parameters()).dtype
        self._weights = [] if lstm is None else _packed(lstm)
        # Without an LSTM there is room for one layer of no units.
        hidden, layers = (0, 1) if lstm is None else (lstm.hidden_size, lstm.num_layers)
        self._sizes = Sizes(features, hidden, layers, extra, outputs, scalars)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        """As :meth:`Backend.statistics`."""
        return statistics_without_coordinates(rule, tensors, loss)

    @abstractmethod
    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        """Advance the state of a block; the change of its parameters, ``(1, n)``."""

    def blocks(self, tensors: Tensors) -> Iterator[Block]:
        """All coordinates, each in one block, with parameters and gradients in the workspace."""
        pieces = [
            (index, *piece)
            for index, (param, grad) in enumerate(zip(tensors.params, tensors.grads))
            for piece in blocks.pieces(param, grad, self._sizes.block)
            if param.numel()
        ]
        sizes = [param.numel() for param in tensors.params]
        for bundle in blocks.bundles([param.numel() for _, param, _, _ in pieces], self._sizes.block):
            parts = [
                Part(index, param, grad, start, sizes[index], tensors.states[index])
                for index, param, grad, start in (pieces[i] for i in bundle)
            ]
            views = WORKSPACE.views(self._sizes, self._dtype, sum(part.param.numel() for part in parts))
            yield Block(parts, views, self._layers, tensors.maximize)

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


def _packed(lstm: CoordinatewiseLSTM) -> list[Tensor]:
    """The weights and bias of each layer side by side."""
    i, f, g, o = torch.arange(4 * lstm.hidden_size).chunk(4)
    order = torch.cat([i, f, o, g])  # the sigmoids together
    layers = zip(lstm.input_weights, lstm.recurrent_weights, lstm.biases)
    return [torch.cat([w, r, b.unsqueeze(1)], dim=1)[order] for w, r, b in layers]


class LSTMProgram(Program):
    """:class:`~learnedopt.rules.LSTMRule`."""

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__(rule, rule.lstm, 2 if rule.config.preprocessing == "log_sign" else 1, outputs=1)
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
        super().__init__(rule, rule.lstm, 4, extra=3, outputs=2)
        self._config = rule.config
        none = torch.zeros(1, 1, dtype=self._dtype)
        forget, input_ = rule.forget_gate, rule.input_gate
        self._gates = torch.cat(
            [
                torch.cat([forget.weight, none, forget.bias.unsqueeze(1)], dim=1),
                torch.cat([input_.weight[:, :-1], none, input_.weight[:, -1:], input_.bias.unsqueeze(1)], dim=1),
            ]
        )

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
        super().__init__(rule, rule.lstm, 9, outputs=3, scalars=7)
        self._config = rule.config
        self._readout = torch.cat([rule.readout.weight, rule.readout.bias.unsqueeze(1)], dim=1)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, AdamLSTMRule)

        def sums(corrections: Tensor) -> Tensor:
            totals = torch.zeros_like(corrections)
            for block in self.blocks(tensors):
                v = block.views
                moments = v.scalars[:3].split(1)  # not the state's own: it has not moved yet
                for name, row in zip(ADAM_LSTM.numbers, moments):
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
        moments = [block.open(name, 0, row) for name, row in zip(ADAM_LSTM.numbers, v.scalars[:3].split(1))]
        a, b, _ = self._directions(block, statistics, moments)
        for name, row in zip(ADAM_LSTM.numbers, moments):
            block.write(name, 0, row)
        torch.abs(v.features[:2], out=v.features[3:5])
        shared = v.features[5:]
        shared.copy_(block.of_tensors(statistics[ADAM_LSTM.corrections :], shared))
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
        corrections = block.of_tensors(statistics[: ADAM_LSTM.corrections], v.scalars[3:6]).split(1)
        torch.mul(square, corrections[2], out=rms).clamp_(min=limits.tiny).sqrt_().add_(config.eps)
        directions = list(v.features[:3].split(1))
        for moment, correction, direction in zip((fast, slow), corrections, directions):
            torch.mul(moment, correction, out=direction).div_(rms)
        torch.div(grad, rms, out=directions[2])
        return directions


class ScheduleFreeLSTMProgram(Program):
    """:class:`~learnedopt.rules.ScheduleFreeLSTMRule`."""

    def __init__(self, rule: ScheduleFreeLSTMRule) -> None:
        super().__init__(rule, rule.lstm, 14, outputs=4, scalars=10)
        self._config = rule.config
        self._readout_of_features, top = rule.readout.weight[:, :14].contiguous(), rule.readout.weight[:, 14:]
        self._readout = torch.cat([top, rule.readout.bias.unsqueeze(1)], dim=1)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, ScheduleFreeLSTMRule)
        limit = rule.way_limit

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(SCHEDULE_FREE_LSTM.sums, corrections.shape[1])
            for block in self.blocks(tensors):
                v = block.views
                numbers = v.scalars[:4].split(1)  # not the state's own: it has not moved yet
                for name, row in zip(SCHEDULE_FREE_LSTM.numbers, numbers):
                    block.read(name, 0, row)
                momentum, square, offset, way = numbers
                factors = block.of_tensors(corrections, v.scalars[4:7])
                a, g = self._directions(block, factors, momentum, square)
                way.addcmul_(factors[2:3], v.param).sub_(v.param).clamp_(-limit, limit)
                slope = torch.clamp(v.grad, -limit, limit, out=v.features[10:11])
                products = v.features[2:10]
                pairs = ((v.param, v.param), (a, g), (a, a), (offset, offset), (offset, a))
                of_way = ((slope, way), (slope, slope), (way, way))
                for (left, right), product in zip((*pairs, *of_way), products.split(1)):
                    torch.mul(left, right, out=product)
                block.add_to(products, totals)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        rows = zip(SCHEDULE_FREE_LSTM.numbers, v.scalars[:4].split(1))
        momentum, square, offset, origin = (block.open(name, 0, row) for name, row in rows)
        factors = block.of_tensors(statistics[:5], v.scalars[4:9])
        fresh, averaging, per_offset = factors[2:].split(1)
        block.write("origin", 0, origin.addcmul_(fresh, v.param))
        a, g = self._directions(block, factors, momentum, square)
        block.write("momentum", 0, momentum)
        block.write("square", 0, square)
        torch.abs(a, out=v.features[2:3])
        torch.mul(offset, per_offset, out=v.features[3:4])
        shared = v.features[4:]
        shared.copy_(block.of_tensors(statistics[5:], shared))
        self.run_lstm(block)
        out = torch.mm(self._readout, v.top, out=v.out).addmm_(self._readout_of_features, v.features)
        step, mix, weight = out[:1], out[1:3], out[3:]
        step.mul_(config.log_step_gain / config.log_step_bound).tanh_().mul_(config.log_step_bound).exp_()
        mix.div_(config.mix_bound).tanh_().mul_(config.mix_bound)
        weight.div_(config.log_averaging_bound).tanh_().mul_(config.log_averaging_bound).exp_()
        weight.mul_(averaging).clamp_(max=1.0)
        mix[:1].add_(1.0).mul_(g).addcmul_(mix[1:], a)
        move = step.mul_(mix[:1]).mul_(config.nominal_step)
        # What the average takes of the offset goes to the parameters, and what is left stays.
        offset.sub_(move, alpha=config.interpolation)
        delta = torch.mul(weight, offset, out=mix[:1])
        block.write("offset", 0, offset.mul_(weight.neg_().add_(1.0)))
        return delta.sub_(move, alpha=1.0 - config.interpolation)

    def _directions(self, block: Block, corrections: Tensor, momentum: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the moments; the momentum and the gradient over the running RMS, the first two features."""
        v = block.views
        return _adam_directions(v.grad, corrections, momentum, square, self._config, v.features[:2], v.scalars[9:])


class RNNpropProgram(Program):
    """:class:`~learnedopt.rules.RNNpropRule`."""

    def __init__(self, rule: RNNpropRule) -> None:
        super().__init__(rule, rule.lstm, rule.config.hidden_size, outputs=1, scalars=8)
        self._config = rule.config
        self._inputs, self._readout = (
            torch.cat([linear.weight, linear.bias.unsqueeze(1)], dim=1) for linear in (rule.inputs, rule.readout)
        )

    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        names = ("momentum", "square")
        momentum, square = moments = [block.open(name, 0, row) for name, row in zip(names, v.scalars[:2].split(1))]
        corrections = block.of_tensors(statistics, v.scalars[2:4])
        directions, rms = v.scalars[4:7], v.scalars[7:]
        _adam_directions(v.grad, corrections, momentum, square, config, directions[:2], rms)
        for name, row in zip(names, moments):
            block.write(name, 0, row)
        directions[2].fill_(1.0)
        F.elu_(torch.mm(self._inputs, directions, out=v.features))
        self.run_lstm(block)
        return torch.mm(self._readout, v.top, out=v.out).tanh_().mul_(-config.output_scale)


def _adam_directions(
    grad: Tensor,
    corrections: Tensor,
    momentum: Tensor,
    square: Tensor,
    config: ScheduleFreeLSTMConfig | RNNpropConfig,
    out: Tensor,
    rms: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`~learnedopt.rules.moments.adam_directions` into the two rows of ``out``, the moments where they are."""
    limits = torch.finfo(grad.dtype)
    limit = 0.5 * math.sqrt(limits.max)
    grad.clamp_(-limit, limit)
    momentum.mul_(config.momentum_decay).add_(grad, alpha=1.0 - config.momentum_decay)
    torch.mul(grad, grad, out=rms)
    square.mul_(config.square_decay).add_(rms, alpha=1.0 - config.square_decay)
    torch.mul(square, corrections[1:2], out=rms).clamp_(min=limits.tiny).sqrt_().add_(config.eps)
    a = torch.mul(momentum, corrections[:1], out=out[:1]).div_(rms)
    return a, torch.div(grad, rms, out=out[1:])


def _log_sign(x: Tensor, p: float, out: Tensor) -> None:
    """:func:`~learnedopt.rules.log_sign` of ``(1, n)`` into ``(2, n)``."""
    torch.abs(x, out=out[:1]).clamp_(min=math.exp(-p)).log_().div_(p).clamp_(min=-1.0)
    torch.mul(x, math.exp(p), out=out[1:]).clamp_(-1.0, 1.0)


_PROGRAMS: dict[type[UpdateRule], Callable[[Any], Program]] = {
    LSTMRule: LSTMProgram,
    MetaLSTMRule: MetaLSTMProgram,
    AdamLSTMRule: AdamLSTMProgram,
    ScheduleFreeLSTMRule: ScheduleFreeLSTMProgram,
    RNNpropRule: RNNpropProgram,
}
_READY: WeakKeyDictionary[UpdateRule, Program] = WeakKeyDictionary()


def _program(rule: UpdateRule) -> Program:
    """A rule's program, made once."""
    if rule not in _READY:
        _READY[rule] = _PROGRAMS[type(rule)](rule)
    return _READY[rule]
