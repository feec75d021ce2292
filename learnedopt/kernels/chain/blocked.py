"""The default's whole step in plain torch, for machines without a compiler: tensor by tensor, on tiles that stay in a
cache, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels.core.base import StepOptions, Tensors
from learnedopt.kernels.core.dispatch import keep_tensor_state
from learnedopt.rules import ChainRule, InEigenbases, LawsRule, NormalizedGradientRule, State
from learnedopt.rules.coordinates import AGE, Side, as_matrix, blocks, next_age
from learnedopt.rules.eigenbasis import Eigenbases
from learnedopt.rules.laws import Mean, Row
from learnedopt.rules.moments import in_range
from learnedopt.rules.normalized import Row as Normalized

PIECE = 1 << 14
"""Coordinates that are worked on at once where there are no bases: few enough to stay in a cache with their state."""
TILE = 1 << 16
"""Coordinates of a tile one of whose sides has no bases."""
SMALLEST, LARGEST = 1e-26, 1e18
"""Mean squares of gradients between which they can be squared and multiplied as they are."""


@dataclass(frozen=True)
class _Moves:
    """What becomes of one tensor's coordinates."""

    square_decay: float
    eps: float
    correction: float
    floor: float
    from_offset: float
    from_direction: float
    step: float
    kept: float
    lr: float
    decay: float
    threshold: float = 0.0

    def normalize(self, grad: Tensor, square: Tensor, room: Tensor) -> Tensor:
        """Make a direction of a gradient, in place."""
        if self.threshold:
            grad.masked_fill_(torch.abs(grad, out=room) <= self.threshold, 0.0)
        tiny = torch.finfo(room.dtype).tiny
        square.mul_(self.square_decay)
        if self.floor:
            large = grad * grad
            torch.add(large, self.floor, out=room).clamp_(min=tiny)
            grad.mul_(large.div_(room))
            square.add_((1.0 - self.square_decay) * self.floor)
        square.addcmul_(grad, grad, value=1.0 - self.square_decay)
        torch.mul(square, self.correction, out=room)
        room.clamp_(min=tiny).sqrt_().add_(self.eps)
        return grad.div_(room)

    def move(self, param: Tensor, offset: Tensor, direction: Tensor) -> None:
        if not self.lr:
            return
        if self.decay != 1.0:
            param.mul_(self.decay)
        param.add_(offset, alpha=self.lr * self.from_offset)
        param.add_(direction, alpha=-self.lr * self.from_direction)
        offset.add_(direction, alpha=-self.step).mul_(self.kept)


def step(rule: ChainRule, tensors: Tensors, options: StepOptions) -> None:
    """As :func:`learnedopt.kernels.step`."""
    first, then = rule.first, rule.then
    bases = first.coordinates if isinstance(first, InEigenbases) else None
    normalized: Any = first.inner if isinstance(first, InEigenbases) else first
    assert isinstance(then, LawsRule) and isinstance(normalized, NormalizedGradientRule)
    matrices = [Matrix(tensors, index, then.way_limit) for index in range(len(tensors.params))]
    totals = torch.tensor([[*matrix.totals, matrix.square] for matrix in matrices], dtype=torch.float64).T
    means = (totals / torch.tensor([max(count, 1) for count in tensors.counts])).to(tensors.dtype)
    names = [name for name, spec in rule.state_spec().items() if spec.scope == "tensor"]
    state = {name: torch.stack([state[name] for state in tensors.states]) for name in names}
    together = tensors.num_together
    statistics, tensor_state = then.statistics_from_means(means[:-1], then.corrections(state), state, together)
    of_first, _ = normalized.statistics_from_means(means[-1:], normalized.corrections(state), state, together)
    lr = float(options.lr)
    statistics, changed = then.with_lr(statistics, state, lr)
    rows, corrections = statistics.T.tolist(), of_first.T.tolist()
    for matrix, row, correction in zip(matrices, rows, corrections):
        moves = _Moves(
            square_decay=normalized.config.square_decay,
            eps=normalized.config.eps,
            correction=correction[Normalized.CORRECTION],
            floor=correction[Normalized.FLOOR],
            from_offset=row[Row.FROM_OFFSET],
            from_direction=row[Row.FROM_DIRECTION],
            step=row[Row.STEP],
            kept=row[Row.KEPT],
            lr=lr,
            decay=1.0 - lr * options.weight_decay,
        )
        matrix.run(bases, moves)
    keep_tensor_state(tensors.states, tensor_state | changed, None)


class Matrix:
    """A tensor: its parameters and gradient as they are computed with, and its state."""

    def __init__(self, tensors: Tensors, index: int, limit: float) -> None:
        self._original, self._state = tensors.params[index], tensors.states[index]
        self._param = self._original.to(tensors.dtype).contiguous()
        grad = tensors.grads[index].to(tensors.dtype).contiguous()
        self._grad = -grad if tensors.maximize else grad
        self.totals = self._totals()
        """What the laws take the means of, added up."""
        self.square = self.totals[Mean.SLOPE_SQUARE]
        """The squared norm of the gradient."""
        most = LARGEST * self._param.numel()
        if not (self.in_range and self.totals[Mean.WAY_SQUARE] <= most):
            self._grad = in_range(self._grad)
            self.square = float(torch.linalg.vector_norm(self._grad.double())) ** 2
            self.totals = self._totals(limit)

    @property
    def in_range(self) -> bool:
        """Whether the gradient is zero, or its squares and products can be taken as it is."""
        count = self._param.numel()
        return SMALLEST * count <= self.square <= LARGEST * count or (not self.square and not self._grad.any())

    def _totals(self, limit: float = math.inf) -> list[float]:
        flat = [x.view(-1) for x in (self._param, self._grad, self._state["origin"])]
        begins, totals = float(self._state["step"]) == 0.0, [0.0] * len(Mean)
        for at in range(0, self._param.numel(), PIECE):
            param, slope, way = (x[at : at + PIECE] for x in flat)
            if begins:
                totals[Mean.PARAM_SQUARE] += float(torch.dot(param, param))
            if limit < math.inf:
                slope, way = slope.double().clamp_(-limit, limit), (way - param).double().clamp_(-limit, limit)
            elif not begins:
                way = way - param
            totals[Mean.SLOPE_SQUARE] += float(torch.dot(slope, slope))
            if not begins:
                totals[Mean.SLOPE_WAY] += float(torch.dot(slope, way))
                totals[Mean.WAY_SQUARE] += float(torch.dot(way, way))
        return totals

    def run(self, bases: Eigenbases | None, moves: _Moves) -> None:
        if AGE in self._state:
            assert bases is not None
            self.run_in_bases(bases, moves)
        else:
            everything = self._param, self._grad, self._state["square"], self._state["offset"]
            flat = [x.view(-1) for x in everything]
            rooms = self._param.new_empty(min(PIECE, len(flat[0]))), self._param.new_empty(min(PIECE, len(flat[0])))
            for at in range(0, len(flat[0]), PIECE):
                param, grad, square, offset = (x[at : at + PIECE] for x in flat)
                direction, room = (x[: len(param)] for x in rooms)
                moves.move(param, offset, moves.normalize(direction.copy_(grad), square, room))
        if self._param is not self._original and moves.lr:
            self._original.copy_(self._param)

    def run_in_bases(self, bases: Eigenbases, moves: _Moves) -> None:
        state, shape = self._state, as_matrix(self._param.shape)
        param, grad, offset, square = (
            x.view(shape) for x in (self._param, self._grad, state["offset"], state["square"])
        )
        age = next_age(int(state[AGE]), self.square != 0.0 or bool(grad.any()))
        if age:
            state[AGE].fill_(age)
            self.follow(bases, grad, square, age)
        threshold = bases.threshold * math.sqrt(self.square)
        moves = _Moves(**{**vars(moves), "threshold": threshold})
        tiles = _Tiles(state, shape)
        for tile, (enter, leave) in tiles:
            direction = moves.normalize(*_room(enter(grad[tile]), square[tile]))
            moves.move(param[tile], offset[tile], leave(direction))

    def follow(self, bases: Eigenbases, grad: Tensor, square: Tensor, age: int) -> None:
        state = self._state
        own = {name: state[name] for name in state if name.endswith(("_factor", "_basis"))}
        if (decay := bases.factor_decay(age)) is not None:
            share = (1.0 - decay) / self.square if self.square else 0.0
            if not self.in_range:
                grad = grad / grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny)
                grad, share = grad / torch.linalg.vector_norm(grad).clamp(min=1.0), 1.0 - decay
            for side in ("left", "right"):
                if (factor := own.get(f"{side}_factor")) is not None:
                    part = blocks(side, grad, factor.shape[-1])
                    left, right = (part, part.mT) if side == "left" else (part.mT, part)
                    add = factor.addmm_ if factor.dim() == 2 else factor.baddbmm_
                    add(left, right, beta=decay, alpha=share)
        after, turns = bases.turn(own, age)
        if turns:
            square.copy_(bases.carry({"square": square}, turns)["square"])
            for name in own:
                own[name].copy_(after[name])


Way = Callable[[Tensor], Tensor]


class _Tiles:
    """A matrix in tiles, a block of one side by a block of the other, and for each the ways to its bases and back."""

    def __init__(self, state: State, shape: tuple[int, int]) -> None:
        self._state, self._shape = state, shape
        self._lengths = [self._length(side, dim) for dim, side in enumerate(("left", "right"))]

    def _length(self, side: str, dim: int) -> int:
        """Of a side of a tile: a block, or as much as makes a tile of some size."""
        if f"{side}_basis" in self._state:
            return self._state[f"{side}_basis"].shape[-1]
        return min(self._shape[dim], max(512, TILE // self._shape[1 - dim]))

    def __iter__(self) -> Iterator[tuple[tuple[slice, slice], tuple[Way, Way]]]:
        rows, columns = self._shape
        height, width = self._lengths
        for i in range(-(-rows // height)):
            left = self._block("left", i)
            for j in range(-(-columns // width)):
                right = self._block("right", j)
                tile = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                yield tile, _ways(left, right)

    def _block(self, side: Side, index: int) -> tuple[Tensor, Tensor] | None:
        """A basis, and which of its rows or columns have had no gradient."""
        if f"{side}_basis" not in self._state:
            return None
        basis, factor = self._state[f"{side}_basis"], self._state[f"{side}_factor"]
        if basis.dim() > 2:
            basis, factor = basis[index], factor[index]
        return basis, factor.diagonal() == 0.0


def _ways(left: tuple[Tensor, Tensor] | None, right: tuple[Tensor, Tensor] | None) -> tuple[Way, Way]:
    def enter(x: Tensor) -> Tensor:
        x = x if left is None else left[0].mT @ x
        return x if right is None else x @ right[0]

    def leave(x: Tensor) -> Tensor:
        x = x if right is None else (x @ right[0].mT).masked_fill_(right[1], 0.0)
        return x if left is None else (left[0] @ x).masked_fill_(left[1].unsqueeze(-1), 0.0)

    return enter, leave


def _room(grad: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad, square, torch.empty_like(grad)
