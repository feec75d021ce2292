"""Fast on the CPU without a compiler: rules written out in place on blocks of reused memory.

Where a rule allocates every intermediate result, here each has its place in a workspace. A rule's folder has its
:class:`Program`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from learnedopt.kernels.core import blocks, coded, registry
from learnedopt.kernels.core.base import Backend, Case, StepOptions, Tensors
from learnedopt.kernels.core.means import statistics_without_coordinates
from learnedopt.kernels.core.state import LOW, SCALE
from learnedopt.kernels.core.workspace import WORKSPACE, Sizes, Views
from learnedopt.rules.base import State, UpdateRule


class BlockedBackend(Backend):
    """In-place operations of plain torch for rules that have a program, on the CPU."""

    name: ClassVar[str] = "blocked"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cpu":
            return f"it runs on the CPU, and the parameters are on {case.device}"
        return registry.refusal(self.name, case.rule)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        program: Program = registry.program(self.name, rule)
        return program.statistics(rule, tensors, loss)

    def update(self, rule: UpdateRule, tensors: Tensors, statistics: Tensor, options: StepOptions) -> None:
        program: Program = registry.program(self.name, rule)
        lr = float(options.lr)
        for block in program.blocks(tensors):
            delta = program.delta(block, statistics)
            if lr:
                param = block.views.param
                if options.weight_decay:
                    param.mul_(1.0 - lr * options.weight_decay)
                block.write_param(param.add_(delta, alpha=lr))


class Program(ABC):
    """A rule made ready: weights packed, sizes known.

    A subclass computes :meth:`delta`, and :meth:`statistics` where the rule looks at coordinates there.

    Args:
        sizes: The rows that it needs in the workspace.
    """

    def __init__(self, rule: UpdateRule, sizes: Sizes) -> None:
        spec = {name: spec.shape[:1] for name, spec in rule.state_spec().items() if spec.scope == "coordinate"}
        self._layers = {name + part: math.prod(shape) for name, shape in spec.items() for part in ("", LOW, SCALE)}
        self._sizes = sizes

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        """Why it cannot serve a rule, as the end of a sentence; ``None`` where it can."""
        return None

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        """As :meth:`Backend.statistics`."""
        return statistics_without_coordinates(rule, tensors, loss)

    @abstractmethod
    def delta(self, block: Block, statistics: Tensor) -> Tensor:
        """Advance the state of a block; the change of its parameters, ``(1, n)``."""

    def blocks(self, tensors: Tensors) -> Iterator[Block]:
        """All coordinates, each in one block, with parameters and gradients in the workspace."""
        pieces = [
            (index, views, start)
            for index, together in enumerate(zip(tensors.params, tensors.grads, tensors.own_grads or tensors.grads))
            for views, start in blocks.pieces(together, self._sizes.block)
            if together[0].numel()
        ]
        sizes = [param.numel() for param in tensors.params]
        for bundle in blocks.bundles([views[0].numel() for _, views, _ in pieces], self._sizes.block):
            parts = [
                Part(index, param, grad, own_grad, start, sizes[index], tensors.states[index])
                for index, (param, grad, own_grad), start in (pieces[i] for i in bundle)
            ]
            views = WORKSPACE.views(self._sizes, tensors.dtype, sum(part.param.numel() for part in parts))
            yield Block(parts, views, self._layers, tensors.maximize)


class Part(NamedTuple):
    """A stretch of one tensor's coordinates, and the state of the whole tensor."""

    tensor: int
    """Which of the step's."""
    param: Tensor
    grad: Tensor
    own_grad: Tensor
    start: int
    size: int
    """Coordinates of the whole tensor."""
    state: State

    def entry(self, name: str, layer: int, layers: int) -> Tensor:
        """What is kept of an entry as a matrix: ``(H, n)`` of one layer of a vector, ``(1, n)`` of a number."""
        whole = self.state[name].view(layers, -1, self.size)[layer]
        count = self.param.numel()
        return whole if count == self.size else whole.narrow(1, self.start, count)


class Block:
    """Coordinates side by side, of one large tensor or of several small ones, and the workspace for them."""

    def __init__(self, parts: list[Part], views: Views, layers: Mapping[str, int], maximize: bool) -> None:
        self.parts, self.views = parts, views
        self._layers, self._maximize = layers, maximize
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

    def read_own_grad(self, out: Tensor) -> Tensor:
        """The gradients in the tensors' own coordinates, into ``(1, n)``."""
        for part, chunk in zip(self.parts, self._chunks(out)):
            chunk.view(part.own_grad.shape).copy_(part.own_grad)
        return out.neg_() if self._maximize else out

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
            coded.decode(self, name, layer, out)

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
            values = coded.encode(self, name, layer, values)
        for kept, chunk in zip(entries, self._chunks(values)):
            if kept is not chunk:  # else it was opened, and changed where it is
                kept.copy_(chunk)

    def of_tensors(self, columns: Tensor, room: Tensor) -> Tensor:
        """Numbers of each tensor, ``(K, S)``, for each coordinate: ``(K, n)``, or ``(K, 1)`` if all are alike."""
        own = [columns.narrow(1, part.tensor, 1) for part in self.parts]
        if len(own) == 1:
            return own[0]
        return torch.cat([column.expand(-1, count) for column, count in zip(own, self._counts)], dim=1, out=room)

    def add_to(self, values: Tensor, sums: Tensor) -> None:
        """Add values ``(K, n)`` up over each tensor, ``(K, S)``."""
        indices = torch.tensor([part.tensor for part in self.parts])
        sums.index_add_(1, indices, torch.stack([chunk.sum(1) for chunk in self._chunks(values)], dim=1))

    def _chunks(self, values: Tensor) -> Sequence[Tensor]:
        """The columns of each part."""
        return (values,) if len(self.parts) == 1 else values.split(self._counts, dim=1)
