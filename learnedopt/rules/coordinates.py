"""Coordinates of a matrix that follow its gradients: what optimizers and unrolls know of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from learnedopt.rules.base import State

Side = Literal["left", "right"]

AGE = "age"
"""The own entry of a tensor that says how many steps its coordinates have seen: a whole number, on the host where an
optimizer keeps it, which decides by it."""


class Coordinates(Protocol):
    """Coordinates for matrices, which follow their gradients.

    A tensor that has them keeps entries of its own in its state: *own* in what follows, each with the leading
    dimensions of the matrices ``(..., m, n)``. One of them is :data:`AGE`, which counts the steps that they have seen.
    """

    def serve(self, shape: Sequence[int]) -> bool:
        """Whether tensors of this shape have such coordinates; others stay as they are."""

    def initial(self, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | None) -> State:
        """The own entries of a tensor of this shape before its first step; none where they do not serve it."""

    def cut(self, shape: Sequence[int]) -> int | None:
        """Along which dimension of ``(..., m, n)`` strips can be worked on apart, -2 or -1; ``None`` if along none."""

    def follow(self, grad: Iterable[Tensor], size: GradientSize, own: State, age: int) -> tuple[State, Turns]:
        """The own entries, without age, after a gradient that is whole or in strips, and how coordinates turned.

        Args:
            age: The step, of those that they have seen; the first is 1 (:func:`next_age`).
        """

    def carry(self, state: State, turns: Turns) -> State:
        """The coordinate-scope state of a matrix, ``(..., m, n)``, once coordinates have turned."""

    def enter(self, x: Tensor, own: State) -> Tensor:
        """A matrix in these coordinates."""

    def enter_grad(self, grad: Tensor, own: State, size: GradientSize) -> Tensor:
        """A gradient in these coordinates, without what may be rounding errors."""

    def leave(self, x: Tensor, own: State) -> Tensor:
        """The reverse of :meth:`enter`, with exact zeros for rows and columns that have had no gradient."""


@dataclass(frozen=True)
class GradientSize:
    """How large a matrix of gradients ``(..., m, n)`` is; each ``(..., 1, 1)``."""

    largest: Tensor
    """The absolute value of its largest element."""
    norm: Tensor
    """Its norm in units of that, because squares of what is very large or small are out of range."""

    @classmethod
    def of(cls, grad: Iterable[Tensor]) -> GradientSize:
        """Of a gradient that is whole, or in strips."""
        largest = torch.stack([strip.abs().amax((-2, -1), keepdim=True) for strip in grad]).amax(0)
        largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        squares = [(strip / largest).square().sum((-2, -1), keepdim=True) for strip in grad]
        return cls(largest, torch.stack(squares).sum(0).sqrt())

    def __getitem__(self, index: list[int]) -> GradientSize:
        """Of some of the matrices."""
        return GradientSize(self.largest[index], self.norm[index])


class Turns:
    """How bases turned: for each side that did, from old coordinates to new, and which columns are where."""

    def __init__(self) -> None:
        self._sides: list[tuple[Side, Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._sides)

    def add(self, side: Side, turn: Tensor, order: Tensor) -> None:
        self._sides.append((side, turn, order))

    def carry(self, x: Tensor, turns_as: Literal["column", "direction", "square"]) -> Tensor:
        """State ``(*spec, ..., m, n)`` of the old coordinates in the new ones."""
        for side, turn, order in self._sides:
            if turns_as != "column":
                x = along(side, turn if turns_as == "direction" else turn.square(), x)
                continue
            parts = blocks(side, x, order.shape[-1])
            if side == "left":
                parts = parts.gather(-2, order.unsqueeze(-1).expand(parts.shape))
            else:
                parts = parts.gather(-1, order.unsqueeze(-2).expand(parts.shape))
            x = joined(side, parts, x)
        return x


def blocks(side: Side, x: Tensor, length: int) -> Tensor:
    """A matrix ``(..., m, n)`` cut along a side, ``(..., count, length, n)`` or ``(..., count, m, length)``; itself if
    there is but one block."""
    if side == "left":
        return x if x.shape[-2] == length else x.unflatten(-2, (-1, length))
    return x if x.shape[-1] == length else x.unflatten(-1, (-1, length)).movedim(-2, -3)


def joined(side: Side, parts: Tensor, like: Tensor) -> Tensor:
    """The reverse of :func:`blocks`."""
    if parts.shape[-2:] == like.shape[-2:]:
        return parts
    return parts.flatten(-3, -2) if side == "left" else parts.movedim(-3, -2).flatten(-2)


def along(side: Side, by: Tensor, x: Tensor) -> Tensor:
    """Each block of a side times its matrix: ``by @ x`` on the left, ``x @ by.mT`` on the right.

    Args:
        by: ``(..., k, k)`` for a side of k, ``(..., count, k, k)`` for one of several blocks.
        x: ``(..., m, n)``.

    >>> by = torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> along("left", by, torch.ones(4, 1)).flatten()
    tensor([1., 1., 2., 2.])
    """
    parts = blocks(side, x, by.shape[-1])
    return joined(side, by @ parts if side == "left" else parts @ by.mT, x)


def next_age(age: int, begins: bool) -> int:
    """The age in the step to come: counted from a tensor's first gradient that is not zero.

    >>> next_age(0, begins=False), next_age(0, begins=True), next_age(3, begins=False)
    (0, 1, 4)
    """
    return age + 1 if age or begins else 0


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's shape as that of a matrix: its first dimension by all others.

    >>> as_matrix((16, 3, 3, 3))
    (16, 27)
    """
    return shape[0], math.prod(shape[1:])
