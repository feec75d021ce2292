"""Any rule in the eigenbases of each matrix's gradients: the wrapper of the default, and the bases themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learnedopt.rules.base import Advance, RuleConfig, Segments, State, StateSpec, UpdateRule, build_rule
from learnedopt.rules.coordinates import AGE, GradientSize, Side, Turns, along, as_matrix, blocks, next_age
from learnedopt.rules.moments import in_range
from learnedopt.rules.schedule_free import ScheduleFreeConfig

_SIDES: tuple[Side, ...] = ("left", "right")

_LONGEST = 4
"""With blocks, how many times the other a side with bases may be."""
_SMALL = 128
"""With blocks, a side of so many rows may be whole: its factor and its basis take little memory, whatever the other."""
_SMALLER = 4
"""How many times smaller than they may be blocks are made so that they divide a side evenly."""
_FIRST = 4
"""Iterations in the first step: as many as find the direction of a gradient of rank one to within what follows."""


@dataclass(frozen=True)
class InEigenbasesConfig(RuleConfig):
    """Settings of :class:`InEigenbases`."""

    kind: ClassVar[str] = "in_eigenbases"
    inner: RuleConfig = ScheduleFreeConfig(square_decay=0.99)
    """The rule in the bases. Its second moments want a shorter memory than elsewhere: as bases turn, those of before
    become those of other coordinates."""
    factor_decay: float = 0.99
    r"""Decay of the averages of :math:`G G^\top` and :math:`G^\top G`, :math:`\beta_L`."""
    settling: int = 10
    """For how many steps at the beginning bases follow every step."""
    interval: int = 10
    """Every how many steps they do later."""
    factor_interval: int = 1
    """Every how many steps the averages take in a gradient later, each then counting for so many."""
    shift: float = 0.01
    r"""What is added to the diagonals of the factors for the iteration, :math:`\epsilon_L`, relative to their trace.
    What a factor takes to nearly nothing, as that of a gradient of low rank does, so stays where it is, instead of
    following rounding errors."""
    max_side: int = 512
    """The most rows of a basis. A longer side has none, or several, each of a block of it (``blocks``)."""
    blocks: bool = False
    """Whether a side that is longer than ``max_side``, or than ``max_ratio`` times the other, is cut into equal blocks
    with a basis each. Then a side has none that is more than four times as long as the other: the rank of a gradient is
    at most the shorter side's, and there is little to find."""
    max_ratio: float = 2.0
    """With ``blocks``, the most rows of a basis relative to the other side."""
    threshold: float = 1e-6
    """Elements of a gradient in the bases that are smaller than this, relative to its norm, count as zero: they may be
    rounding errors."""


class Eigenbases:
    """The :class:`~learnedopt.rules.coordinates.Coordinates` of :class:`InEigenbases`.

    Args:
        config: Its settings.
        spec: The state of the rule inside, which turns with the bases.
    """

    def __init__(self, config: InEigenbasesConfig, spec: dict[str, StateSpec]) -> None:
        if not 0.0 <= config.factor_decay < 1.0:
            raise ValueError(f"factor_decay must be in [0, 1), got {config.factor_decay}")
        if not 0.0 <= config.shift < math.inf:
            raise ValueError(f"shift must be finite and not negative, got {config.shift}")
        for name, least in (
            *((name, 1) for name in ("settling", "interval", "factor_interval")),
            *(("max_side", 0), ("max_ratio", 1.0), ("threshold", 0.0)),
        ):
            if not least <= getattr(config, name) < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, got {getattr(config, name)}")
        self._config, self._spec = config, spec

    def serve(self, shape: Sequence[int]) -> bool:
        return bool(self.sides(shape))

    def initial(self, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | None) -> State:
        own: State = {}
        for side, (count, length) in self.sides(shape).items():
            lead = (count, length) if count > 1 else (length,)
            own[f"{side}_factor"] = torch.zeros(*lead, length, dtype=dtype, device=device)
            own[f"{side}_basis"] = torch.eye(length, dtype=dtype, device=device).expand(*lead, length).contiguous()
        return {**own, AGE: torch.zeros((), dtype=torch.int64, device="cpu")} if own else {}

    def sides(self, shape: Sequence[int]) -> dict[Side, tuple[int, int]]:
        """Of those sides of a tensor that have bases, how many blocks there are and how long each is."""
        if len(shape) < 2 or math.prod(shape) == 0:
            return {}
        rows, columns = as_matrix(shape)
        if min(rows, columns) == 1:  # a vector
            return {}
        found = {"left": self._blocks(rows, columns), "right": self._blocks(columns, rows)}
        return {side: blocks for side in _SIDES if (blocks := found[side]) is not None}

    def _blocks(self, side: int, other: int) -> tuple[int, int] | None:
        """The blocks of a side: as few and as large as the settings allow, of one size."""
        config = self._config
        if not config.blocks:
            return (1, side) if side <= config.max_side else None
        if side > _LONGEST * other:
            return None
        most = min(config.max_side, max(_SMALL, int(config.max_ratio * other)))
        fewest = -(-side // most)
        # A prime side has none: of one row a basis says nothing, and a ragged block would need a case of its own.
        counts = (count for count in range(fewest, min(_SMALLER * fewest, side // 2) + 1) if side % count == 0)
        count = next(counts, None)
        return None if count is None else (count, side // count)

    def cut(self, shape: Sequence[int]) -> int | None:
        match list(self.sides(shape)):
            case ["left"]:
                return -1  # also where it has several blocks
            case ["right"]:
                return -2
        return None

    @property
    def threshold(self) -> float:
        """Relative to the norm of a gradient, how large an element must be to count."""
        return self._config.threshold

    def is_due(self, age: int) -> bool:
        """Whether bases follow in a step, of which the first is 1."""
        return age <= self._config.settling or age % self._config.interval == 0

    def factor_decay(self, age: int) -> float | None:
        """By how much the averages decay in a step, of which the first is 1; ``None`` where they stay."""
        config = self._config
        if age <= config.settling:
            return config.factor_decay
        return None if age % config.factor_interval else config.factor_decay**config.factor_interval

    def follow(self, grad: Iterable[Tensor], size: GradientSize, own: State, age: int) -> tuple[State, Turns]:
        after, decay = dict(own), self.factor_decay(age)
        if decay is not None:
            squares: dict[Side, Tensor] = {}
            for strip in grad:
                unit = strip / size.largest / size.norm.clamp(min=1.0)
                for side in _SIDES:
                    if f"{side}_factor" in own:
                        part = blocks(side, unit, own[f"{side}_factor"].shape[-1])
                        square = part @ part.mT if side == "left" else part.mT @ part
                        squares[side] = squares[side] + square if side in squares else square
            for side, square in squares.items():
                after[f"{side}_factor"] = decay * own[f"{side}_factor"] + (1.0 - decay) * square
        after.pop(AGE, None)
        return self.turn(after, age)

    def turn(self, own: State, age: int) -> tuple[State, Turns]:
        """The own entries once bases have followed their factors, if it is time for that, and how they turned."""
        after, turns = dict(own), Turns()
        if self.is_due(age):
            for side in _SIDES:
                if f"{side}_factor" not in own:
                    continue
                factor, basis = own[f"{side}_factor"], own[f"{side}_basis"]
                for _ in range(_FIRST if age == 1 else 1):
                    before, (basis, order) = basis, _next_basis(factor, basis, self._config.shift)
                    turns.add(side, basis.mT @ before, order)
                after[f"{side}_basis"] = basis
        return after, turns

    def carry(self, state: State, turns: Turns) -> State:
        if not turns:
            return state
        after: State = {}
        for name, x in state.items():
            # How an entry is kept in few bits is not of the rule, and stays with its column.
            spec = self._spec.get(name, StateSpec())
            after[name] = turns.carry(x, spec.turns_as) if spec.starts_at == "zero" else x
        for name in after:
            if (within := self._spec.get(name, StateSpec()).within) is not None:
                square, times = after[within[0]], within[1]
                # The square root of zero has no derivative.
                most = times * square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
                after[name] = after[name].clamp(-most, most)
        return after

    def enter(self, x: Tensor, own: State) -> Tensor:
        for side in _SIDES:
            if f"{side}_basis" in own:
                x = along(side, own[f"{side}_basis"].mT, x)
        return x

    def enter_grad(self, grad: Tensor, own: State, size: GradientSize) -> Tensor:
        # A coordinate that has had nothing but rounding errors would otherwise be scaled up to a step like any other's.
        grad = self.enter(grad, own)
        if not self._config.threshold:
            return grad
        return grad.masked_fill_(grad.abs() <= self._config.threshold * size.norm * size.largest, 0.0)

    def leave(self, x: Tensor, own: State) -> Tensor:
        for side in _SIDES:
            if f"{side}_basis" in own:
                x = along(side, own[f"{side}_basis"], x)
                unseen = _unseen(own[f"{side}_factor"], x.shape[-2 if side == "left" else -1])
                x = x.masked_fill_(unseen.unsqueeze(-1 if side == "left" else -2), 0.0)
        return x


class InEigenbases(UpdateRule):
    r"""A rule in the eigenbases of each matrix's gradients.

    A tensor of two dimensions or more is a matrix :math:`\Theta`, its first dimension by all others. With :math:`G` its
    gradient, let

    .. math::
        L &\leftarrow \beta_L L + (1 - \beta_L)\, \frac{G G^\top}{\|G\|^2}, \qquad
        R \leftarrow \beta_L R + (1 - \beta_L)\, \frac{G^\top G}{\|G\|^2} \\
        \Delta\Theta &= Q_L\, \mathrm{rule}(Q_L^\top \Theta Q_R,\; Q_L^\top G Q_R)\, Q_R^\top

    where the columns of :math:`Q_L` and :math:`Q_R` tend to the eigenvectors of :math:`L` and :math:`R`: in each of the
    first ``settling`` steps, from the first gradient of a tensor that is not zero, and in every ``interval``-th from
    then on, :math:`Q \leftarrow \mathrm{qr}((L + \epsilon_L \operatorname{tr}(L)\, I)\, Q)`, columns in the order of
    :math:`\mathrm{diag}(Q^\top L Q)`; in the first step, where :math:`Q = I` before, four times. The state of the
    rule turns with them, by :math:`T = Q_\mathrm{new}^\top Q_\mathrm{old}`, as its
    :class:`~learnedopt.rules.StateSpec` says: directions such as the momentum :math:`m` by :math:`T`, second
    moments :math:`v` by :math:`T \odot T`, units of an LSTM stay with their column; and :math:`|m|` is kept to at
    most :math:`\sqrt v` times what it can be where nothing turns
    (:func:`~learnedopt.rules.moments.momentum_bound`). Directions along which gradients differ in size so become
    coordinates of their own, whose steps the rule can scale one by one. Vectors and scalars are optimized as they
    are, and so is a side of a matrix that is longer than ``max_side``.

    Elements of a gradient in the bases that are below :math:`10^{-6} \|G\|`, which may be rounding errors, count as
    zero. What the rule asks about parameters as such, it asks outside the bases.

    What follows from the form, whatever the weights (``tests/rules/`` checks each):

    * A row or a column of a matrix whose gradients have all been zero does not move, and nor does anything at
      ``lr=0``. A single element does move whose row and column have had gradients.
    * Multiplying the loss by a constant changes nothing (up to ``eps``).
    * Permuting the rows or the columns of a matrix permutes its updates, up to rounding.
    * In the bases every coordinate's update is bounded (:meth:`update_bound`); they keep its norm.

    The statistics that the rule takes of a tensor, norms and inner products, are the same in any basis. To
    meta-gradients bases are constants, second-order ones included.

    Shapes: those of the rule; and for a matrix ``(m, n)``, ``left_factor`` and ``left_basis`` are ``(m, m)``,
    ``right_factor`` and ``right_basis`` ``(n, n)``, and ``age`` is ``()``. Each update costs six products of the matrix
    with a basis or with itself.

    Source: this project. That Shampoo is Adam in a rotated space, and Adam worth running there, is from Vyas et al.
    2024, *SOAP* (arXiv:2409.11321, algorithm 3), which also has the iteration for the bases; the factors are those of
    Gupta et al. 2018, *Shampoo* (arXiv:1802.09568, algorithm 1), here of gradients of norm one.

    >>> rule = InEigenbases(InEigenbasesConfig(ScheduleFreeConfig(nominal_step=0.01, square_decay=0.99)))
    >>> segments = Segments([4, 1], shapes=[(2, 2), (1,)])
    >>> param, grad = torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0])
    >>> with torch.no_grad():
    ...     delta, _ = rule.update(param, grad, rule.init_state(segments, param=param), segments)
    >>> delta  # one direction of four, and a number
    tensor([-0.0050, -0.0050, -0.0050, -0.0050, -0.0100])
    """

    config_class = InEigenbasesConfig
    config: InEigenbasesConfig
    coordinates: Eigenbases

    def __init__(self, config: InEigenbasesConfig | None = None, inner: UpdateRule | None = None) -> None:
        super().__init__(config or InEigenbasesConfig())
        self.inner = build_rule(self.config.inner) if inner is None else inner
        if self.inner.coordinates is not None:
            raise ValueError(f"a rule in bases cannot have bases inside, and {self.config.inner.kind!r} has")
        self.needs_loss, self.zero_gradient_is_noop = self.inner.needs_loss, self.inner.zero_gradient_is_noop
        self.counts_tensors = self.inner.counts_tensors
        self.coordinates = Eigenbases(self.config, self.inner.state_spec())

    def state_spec(self) -> dict[str, StateSpec]:
        return self.inner.state_spec()

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        return self.inner.statistics(param, grad, state, segments, loss, own_grad)

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        delta, after = self.inner(param, grad, state, statistics)
        return delta, after

    def update_bound(self) -> float:
        """The largest root mean square of a tensor's change in one step at ``lr=1``, for any weights and gradients.

        That of any coordinate in the bases. Of an element of a matrix it is the bound once it is multiplied by the root
        of how many the matrix has.

        Raises:
            AttributeError: the rule inside has no bound where bases turn.
        """
        bound: Any = self.inner.update_bound
        return float(bound(turning=True))

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        *,
        advance: Advance | None = None,
    ) -> tuple[Tensor, State]:
        if not any(self.coordinates.serve(shape) for shape in segments.shapes):
            return super().update(param, grad, state, segments, loss, advance=advance)
        copies, sizes = segments.copies, list(segments.sizes)

        def parts(values: Tensor) -> list[Tensor]:
            """``(..., N)`` as ``(..., copies, size)`` of each tensor."""
            return list(values.unflatten(-1, (copies, sum(sizes))).split(sizes, dim=-1))

        def joined(values: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(values), dim=-1).flatten(-2)

        spec = self.state_spec()
        params, grads = parts(param), parts(grad)
        inside = {
            name: parts(state[name])
            for name in spec
            if spec[name].scope == "coordinate" and spec[name].starts_at == "zero"
        }
        owns: dict[str, list[Tensor]] = {}
        places: dict[int, tuple[tuple[int, int], State]] = {}
        for index, own in enumerate(self._own(state, segments)):
            if not own:
                continue
            shape = as_matrix(segments.shapes[index])
            matrix = in_range(grads[index]).reshape(copies, *shape)
            with torch.no_grad():
                size = GradientSize.of([matrix])
            before = {name: values[index].unflatten(-1, shape) for name, values in inside.items()}
            own, turned = self._follow(matrix, size, own, before)
            places[index] = shape, own
            for name, value in own.items():
                owns.setdefault(name, []).append(value.flatten(1) if value.dim() > 1 else value.unsqueeze(1))
            for name, value in turned.items():
                inside[name][index] = value.flatten(-2)
            grads[index] = self.coordinates.enter_grad(matrix, own, size).flatten(1)
            if self.inner.reads_param:
                params[index] = self.coordinates.enter(params[index].reshape(copies, *shape), own).flatten(1)
        there = {**state, **{name: joined(values) for name, values in (inside | owns).items()}}
        delta, after = (advance or self.advance)(
            joined(params), joined(grads), there, segments, loss, own=(param, grad)
        )
        moves = parts(delta)
        for index, (shape, own) in places.items():
            moves[index] = self.coordinates.leave(moves[index].unflatten(-1, shape), own).flatten(1)
        return joined(moves), {**there, **after}

    def _own(self, state: State, segments: Segments) -> Iterator[State]:
        """What each tensor has of its own, ``(copies, *shape)``, from where they lie side by side."""
        read: dict[str, int] = {}
        for shape in segments.shapes:
            own: State = {}
            for name, like in self.coordinates.initial(shape, None, torch.device("meta")).items():
                first = read.get(name, 0)
                read[name] = first + like.numel()
                own[name] = (
                    state[name]
                    .unflatten(-1, (segments.copies, -1))[:, first : read[name]]
                    .reshape(segments.copies, *like.shape)
                )
            yield own

    def _follow(self, grad: Tensor, size: GradientSize, own: State, inside: State) -> tuple[State, State]:
        """The own entries of all copies of a tensor after a gradient, and the state turned with them."""
        begins = (size.norm != 0.0).flatten().tolist()
        ages = [next_age(age, begin) for age, begin in zip(own[AGE].tolist(), begins)]
        alike = {age: [copy for copy, its in enumerate(ages) if its == age] for age in ages}
        found = []
        for age, copies in alike.items():
            everything = len(copies) == len(ages)
            here = own if everything else {name: value[copies] for name, value in own.items()}
            turned = inside if everything else {name: value[..., copies, :, :] for name, value in inside.items()}
            if age:
                with torch.no_grad():
                    after, turns = self.coordinates.follow([grad[copies]], size[copies], here, age)
                here = {**here, **after, AGE: torch.full_like(here[AGE], age)}
                turned = self.coordinates.carry(turned, turns)
            found.append((here, turned))
        if len(found) == 1:
            return found[0]
        order = torch.tensor([copy for copies in alike.values() for copy in copies]).argsort()
        return (
            {name: torch.cat([here[name] for here, _ in found])[order] for name in own},
            {name: torch.cat([turned[name] for _, turned in found], -3)[..., order, :, :] for name in inside},
        )


def _unseen(factor: Tensor, length: int) -> Tensor:
    """Which rows or columns, of so many, have had no gradient."""
    seen = factor.diagonal(dim1=-2, dim2=-1) == 0.0
    return seen if seen.shape[-1] == length else seen.flatten(-2)


def _next_basis(factor: Tensor, basis: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration, and the order in which it took the columns."""
    order = (basis * (factor @ basis)).sum(-2).argsort(dim=-1, descending=True, stable=True)
    sorted_ = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    basis, triangle = torch.linalg.qr(factor @ sorted_ + shift * trace * sorted_)
    # Either sign would do. So a column goes on where it pointed to, and the first points along a row or column.
    sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).to(basis.dtype)
    return basis * sign.unsqueeze(-2), order
