"""The default rule: a coordinate-wise rule whose coordinates are those of the eigenbases of each matrix's gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from learnedopt.rules.base import Segments, State, StateSpec, UpdateRule
from learnedopt.rules.moments import in_range, momentum_bound
from learnedopt.rules.schedule_free_lstm import ScheduleFreeLSTMConfig, ScheduleFreeLSTMRule

Side = Literal["left", "right"]
_SIDES: tuple[Side, ...] = ("left", "right")

_FIRST = 4
"""Iterations in the first step: as many as find the direction of a gradient of rank one to within what follows."""
_ROUNDING = 1e-6
"""Relative to the norm of a gradient, what may be left of nothing when it is taken to bases, in float32."""


@dataclass(frozen=True)
class EigenbasisConfig(ScheduleFreeLSTMConfig):
    """Settings of :class:`EigenbasisRule`, and of the rule that it runs in its bases."""

    kind: ClassVar[str] = "eigenbasis"
    square_decay: float = 0.99
    """Shorter than elsewhere: as bases turn, second moments of before become those of other coordinates."""
    factor_decay: float = 0.99
    r"""Decay of the averages of :math:`G G^\top` and :math:`G^\top G`, :math:`\beta_L`."""
    settling: int = 10
    """For how many steps at the beginning bases follow every step."""
    interval: int = 10
    """Every how many steps they do later."""
    shift: float = 0.01
    r"""What is added to the diagonals of the factors for the iteration, :math:`\epsilon_L`, relative to their trace.
    What a factor takes to nearly nothing, as that of a gradient of low rank does, so stays where it is, instead of
    following rounding errors."""
    max_side: int = 512
    """A side of a matrix that is longer than this has no basis of its own."""


class EigenbasisRule(UpdateRule):
    r""":class:`~learnedopt.rules.ScheduleFreeLSTMRule`, in the eigenbases of each matrix's gradients.

    A tensor of two dimensions or more is a matrix :math:`\Theta`, its first dimension by all others. With :math:`G` its
    gradient, let

    .. math::
        L &\leftarrow \beta_L L + (1 - \beta_L)\, \frac{G G^\top}{\|G\|^2}, \qquad
        R \leftarrow \beta_L R + (1 - \beta_L)\, \frac{G^\top G}{\|G\|^2} \\
        \Delta\Theta &= Q_L\, \mathrm{rule}(Q_L^\top \Theta Q_R,\; Q_L^\top G Q_R)\, Q_R^\top

    where the columns of :math:`Q_L` and :math:`Q_R` tend to the eigenvectors of :math:`L` and :math:`R`: in each of the
    first ``settling`` steps, from the first gradient of a tensor that is not zero, and in every ``interval``-th from
    then on, :math:`Q \leftarrow \mathrm{qr}((L + \epsilon_L \operatorname{tr}(L)\, I)\, Q)`, columns in the order of
    :math:`\mathrm{diag}(Q^\top L Q)`; in the first step, where :math:`Q = I` before, four times. The state of the rule
    turns with them, by :math:`T = Q_\mathrm{new}^\top Q_\mathrm{old}`: directions such as the momentum :math:`m` by
    :math:`T`, second moments :math:`v` by :math:`T \odot T`, units of an LSTM stay with their column; and :math:`|m|`
    is kept to at most :math:`\sqrt v` times what it can be where nothing turns
    (:func:`~learnedopt.rules.moments.momentum_bound`). Directions along which gradients differ in size so become
    coordinates of their own, whose steps the rule can scale one by one. Vectors and scalars are optimized as they
    are, and so is a side of a matrix that is longer than ``max_side``.

    Elements of a gradient in the bases that are below :math:`10^{-6} \|G\|`, which may be rounding errors, count as
    zero. What takes many copies at once, :meth:`update`, counts steps from the first, whatever its gradients.

    What follows from the form, whatever the weights (``tests/rules/`` checks each):

    * A row or a column of a matrix whose gradients have all been zero does not move, and nor does anything at
      ``lr=0``. A single element does move whose row and column have had gradients.
    * Multiplying the loss by a constant changes nothing (up to ``eps``).
    * Permuting the rows or the columns of a matrix permutes its updates, up to rounding.
    * In the bases every coordinate's update is bounded (:meth:`update_bound`); they keep its norm.

    The statistics that the rule takes of a tensor, norms and inner products, are the same in any basis. To
    meta-gradients bases are constants, second-order ones included.

    Shapes: those of :class:`~learnedopt.rules.ScheduleFreeLSTMRule`; and for a matrix ``(m, n)``, ``left_factor`` and
    ``left_basis`` are ``(m, m)``, ``right_factor`` and ``right_basis`` ``(n, n)``. Each update costs eight products of
    the matrix with a basis or with itself.

    Source: this project. That Shampoo is Adam in a rotated space, and Adam worth running there, is from Vyas et al.
    2024, *SOAP* (arXiv:2409.11321, algorithm 3), which also has the iteration for the bases; the factors are those of
    Gupta et al. 2018, *Shampoo* (arXiv:1802.09568, algorithm 1), here of gradients of norm one.

    >>> rule, segments = EigenbasisRule(EigenbasisConfig(nominal_step=0.01)), Segments([4, 1], shapes=[(2, 2), (1,)])
    >>> grad = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0])
    >>> with torch.no_grad():
    ...     delta, _ = rule.update(torch.ones(5), grad, rule.init_state(segments), segments)
    >>> delta  # one direction of four, and a number
    tensor([-0.0050, -0.0050, -0.0050, -0.0050, -0.0100])
    """

    config_class = EigenbasisConfig
    config: EigenbasisConfig
    zero_gradient_is_noop = True

    def __init__(self, config: EigenbasisConfig | None = None) -> None:
        super().__init__(config or EigenbasisConfig())
        if not 0.0 <= self.config.factor_decay < 1.0:
            raise ValueError(f"factor_decay must be in [0, 1), got {self.config.factor_decay}")
        if not 0.0 <= self.config.shift < math.inf:
            raise ValueError(f"shift must be finite and not negative, got {self.config.shift}")
        for name, least in (("settling", 1), ("interval", 1), ("max_side", 0)):
            if getattr(self.config, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self.config, name)}")
        names = [field.name for field in dataclasses.fields(ScheduleFreeLSTMConfig)]
        settings = ScheduleFreeLSTMConfig(**{name: getattr(self.config, name) for name in names})
        self.inner = ScheduleFreeLSTMRule(settings)

    def rule_for(self, dims: int) -> UpdateRule:
        return self.inner

    def state_spec(self) -> dict[str, StateSpec]:
        return self.inner.state_spec()

    def update_bound(self) -> float:
        """The largest root mean square of a tensor's change in one step at ``lr=1``, for any weights and gradients.

        That of any coordinate in the bases. Of an element of a matrix it is the bound once it is multiplied by the root
        of how many the matrix has.
        """
        # In the first steps, where corrections of the bias may let through more than the bound on the momentum itself.
        early = math.sqrt(1.0 - self.config.square_decay) / (1.0 - self.config.momentum_decay)
        return max(1.0, early) * self.inner.update_bound()

    def statistics(
        self, param: Tensor, grad: Tensor, state: State, segments: Segments, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self.inner.statistics(param, grad, state, segments, loss)

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        delta, after = self.inner(param, grad, state, statistics)
        return delta, after

    def matrices(self, shape: Sequence[int]) -> dict[str, tuple[int, int]]:
        return {
            f"{side}_{what}": (length, length)
            for side, length in self.sides(shape).items()
            for what in ("factor", "basis")
        }

    def sides(self, shape: Sequence[int]) -> dict[Side, int]:
        """The lengths of those sides of a tensor that have bases."""
        if len(shape) < 2 or math.prod(shape) == 0:
            return {}
        rows, columns = as_matrix(shape)
        if min(rows, columns) == 1:  # a vector
            return {}
        lengths: dict[Side, int] = {"left": rows, "right": columns}
        return {side: length for side, length in lengths.items() if length <= self.config.max_side}

    def is_due(self, step: int) -> bool:
        """Whether bases follow in a step, of which the first is 1."""
        return step <= self.config.settling or step % self.config.interval == 0

    def turn(
        self, param: Tensor, grad: Tensor, state: State, segments: Segments
    ) -> tuple[Tensor, Tensor, State, Callable[[Tensor], Tensor]]:
        if not any(self.sides(shape) for shape in segments.shapes):
            return param, grad, state, lambda delta: delta
        copies, sizes = segments.copies, list(segments.sizes)
        step = int(state["step"].flatten()[0]) + 1  # all tensors of one flat state are of one age
        turning = [name for name, spec in self.state_spec().items() if spec.scope == "coordinate"]

        def parts(values: Tensor) -> list[Tensor]:
            """``(..., N)`` as ``(..., copies, size)`` of each tensor."""
            return list(values.unflatten(-1, (copies, sum(sizes))).split(sizes, dim=-1))

        def joined(values: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(values), dim=-1).flatten(-2)

        params, grads, coordinates = parts(param), parts(grad), {name: parts(state[name]) for name in turning}
        matrices: dict[str, list[Tensor]] = {}
        offsets: dict[str, int] = {}
        bases: list[Bases | None] = []
        for index, shape in enumerate(segments.shapes):
            own: State = {}
            for name, sides in self.matrices(shape).items():
                first = offsets.get(name, 0)
                offsets[name] = first + math.prod(sides)
                own[name] = state[name].unflatten(-1, (copies, -1))[:, first : offsets[name]].unflatten(-1, sides)
            if not own:
                bases.append(None)
                continue
            size, rectangle = sizes[index], as_matrix(shape)
            matrix = in_range(grads[index]).reshape(copies, *rectangle)
            with torch.no_grad():
                size_of_grad = GradientSize.of([matrix])
                after, turns = self.followed([matrix], size_of_grad, own, step)
            for name, value in after.items():
                matrices.setdefault(name, []).append(value.flatten(-2))
            here = Bases(after)
            bases.append(here)
            params[index] = here.enter(params[index].reshape(copies, *rectangle)).reshape(copies, size)
            grads[index] = above_rounding(here.enter(matrix), size_of_grad).reshape(copies, size)
            before = {name: values[index].unflatten(-1, rectangle) for name, values in coordinates.items()}
            for name, value in self.carried(before, turns).items():
                coordinates[name][index] = value.flatten(-2)

        def back(delta: Tensor) -> Tensor:
            changes = parts(delta)
            for index, (here, shape) in enumerate(zip(bases, segments.shapes)):
                if here is not None:
                    changes[index] = here.leave(changes[index].unflatten(-1, as_matrix(shape))).flatten(-2)
            return joined(changes)

        inside = {
            **state,
            **{name: joined(values) for name, values in coordinates.items()},
            **{name: joined(values) for name, values in matrices.items()},
        }
        return joined(params), joined(grads), inside, back

    def followed(self, grad: Iterable[Tensor], size: GradientSize, matrices: State, step: int) -> tuple[State, Turns]:
        """The matrices of a tensor after a gradient, and how its bases turned.

        Args:
            grad: ``(..., m, n)``, whole; or, where only one side has a basis, in strips along the other.
            size: The gradient's.
            matrices: As :meth:`matrices` names them, ``(..., m, m)`` or ``(..., n, n)``. Not written.
            step: The number of the step, from 1.
        """
        decay, after, turns = self.config.factor_decay, {}, Turns()
        squares: dict[Side, Tensor] = {}
        for strip in grad:
            unit = strip / size.largest / size.norm.clamp(min=1.0)
            for side in _SIDES:
                if f"{side}_factor" in matrices:
                    square = unit @ unit.mT if side == "left" else unit.mT @ unit
                    squares[side] = squares[side] + square if side in squares else square
        for side, square in squares.items():
            factor = decay * matrices[f"{side}_factor"] + (1.0 - decay) * square
            basis = matrices[f"{side}_basis"]
            if step == 1:  # before which it is zero
                basis = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device).expand_as(basis)
            if self.is_due(step):
                for _ in range(_FIRST if step == 1 else 1):
                    before, (basis, order) = basis, _next_basis(factor, basis, self.config.shift)
                    turns.add(side, basis.mT @ before, order)
            after[f"{side}_factor"], after[f"{side}_basis"] = factor, basis
        return after, turns

    def carried(self, state: State, turns: Turns) -> State:
        """The coordinate-scope state of a matrix, ``(..., m, n)``, in bases that have turned."""
        if not turns:
            return state
        spec = self.state_spec()
        # How an entry is kept in few bits is not of the rule, and stays with its column.
        after = {name: turns.carry(x, spec[name].turns_as if name in spec else "column") for name, x in state.items()}
        bound = momentum_bound(self.config.momentum_decay, self.config.square_decay)
        if math.isfinite(bound):
            # The two turn differently, so that momentum may come to where there is little of second moments.
            # The square root of zero has no derivative.
            most = bound * after["square"].clamp(min=torch.finfo(after["square"].dtype).tiny).sqrt()
            after["momentum"] = after["momentum"].clamp(-most, most)
        return after


class Bases:
    """The bases of one matrix, or of several of one shape; ``(..., m, m)`` and ``(..., n, n)``, or one of them."""

    def __init__(self, matrices: State) -> None:
        self._left, self._right = matrices.get("left_basis"), matrices.get("right_basis")
        self._matrices = matrices

    def enter(self, x: Tensor) -> Tensor:
        """A matrix ``(..., m, n)`` in the bases."""
        x = x if self._left is None else self._left.mT @ x
        return x if self._right is None else x @ self._right

    def leave(self, x: Tensor) -> Tensor:
        """The reverse of :meth:`enter`, but for rows and columns that have had no gradient: these get exact zeros."""
        if self._left is not None:
            x = (self._left @ x).masked_fill_(self._unseen("left").unsqueeze(-1), 0.0)
        if self._right is not None:
            x = (x @ self._right.mT).masked_fill_(self._unseen("right").unsqueeze(-2), 0.0)
        return x

    def _unseen(self, side: Side) -> Tensor:
        return self._matrices[f"{side}_factor"].diagonal(dim1=-2, dim2=-1) == 0.0


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
                by = turn if turns_as == "direction" else turn.square()
                x = by @ x if side == "left" else x @ by.mT
            elif side == "left":
                x = x.gather(-2, order.unsqueeze(-1).expand(x.shape))
            else:
                x = x.gather(-1, order.unsqueeze(-2).expand(x.shape))
        return x


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's shape as that of a matrix: its first dimension by all others.

    >>> as_matrix((16, 3, 3, 3))
    (16, 27)
    """
    return shape[0], math.prod(shape[1:])


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


def above_rounding(turned: Tensor, size: GradientSize) -> Tensor:
    """Gradients in the bases, here changed: zero where they are no more than rounding leaves of nothing.

    A coordinate that has had nothing but rounding errors would otherwise be scaled up to a step like any other's.
    """
    return turned.masked_fill_(turned.abs() <= _ROUNDING * size.norm * size.largest, 0.0)


def _next_basis(factor: Tensor, basis: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration, and the order in which it took the columns."""
    order = (basis * (factor @ basis)).sum(-2).argsort(dim=-1, descending=True, stable=True)
    sorted_ = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    basis, triangle = torch.linalg.qr(factor @ sorted_ + shift * trace * sorted_)
    # Either sign would do. So a column goes on where it pointed to, and the first points along a row or column.
    sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).to(basis.dtype)
    return basis * sign.unsqueeze(-2), order
