"""Coordinates of a matrix that follow its gradients: what optimizers and unrolls know of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from learnedopt.rules.base import State

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
        self._sides: list[tuple[Literal["left", "right"], Tensor, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._sides)

    def add(self, side: Literal["left", "right"], turn: Tensor, order: Tensor) -> None:
        self._sides.append((side, turn, order))

    def carry(self, x: Tensor, turns_as: Literal["column", "direction", "square"]) -> Tensor:
        """State ``(*spec, ..., m, n)`` of the old coordinates in the new ones."""
        for side, turn, order in self._sides:
            if turns_as != "column":
                by = turn if turns_as == "direction" else turn.square()
                x = by @ x if side == "left" else x @ by.mT
            elif side == "left":
                x = x.gather(-2, order.unsqueeze(-1).expand(x.shape))
            else:
                x = x.gather(-1, order.unsqueeze(-2).expand(x.shape))
        return x


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
