"""A step of a rule in coordinates of its own: gradients go there, a backend does what it always does, moves come back.

Parameters stay where they are, and so does what is a point among them. What is in bases costs copies: gradients there,
and the moves, of as many tensors at once as have together :data:`AT_ONCE` coordinates. A tensor that has more is worked
on in strips, if its bases allow that: once for what the rule has to know of the whole, and once to move it. Small ones
of one shape are stacked, because what their products cost is the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels.core import blocks, dispatch
from learnedopt.kernels.core.base import Backend, StepOptions, Tensors
from learnedopt.kernels.core.state import state_layout
from learnedopt.rules import InEigenbases, State, UpdateRule
from learnedopt.rules.coordinates import AGE, Coordinates, GradientSize, as_matrix, next_age
from learnedopt.rules.moments import in_range

AT_ONCE = 3 << 20
"""Coordinates that are taken into bases at once, and above which a tensor is cut: five copies of them in float32 are
less than 64 MiB."""
STRIP = AT_ONCE // 4
"""Coordinates of a strip, of which state may be copied too."""
STACKED = 1 << 16
"""Coordinates above which a tensor is not stacked with others: its products take longer than the calls for them."""


def parts(rule: InEigenbases) -> tuple[UpdateRule]:
    """What backends are given: the rule inside."""
    return (rule.inner,)


def step(backend: Backend, rule: InEigenbases, tensors: Tensors, options: StepOptions) -> None:
    """As :func:`learnedopt.kernels.step`, in bases where the states of tensors have any; others are moved as they are.

    Raises:
        RuntimeError: a CUDA graph is being captured. Nothing has changed.
    """
    if all(AGE not in state for state in tensors.states):
        dispatch.step(backend, rule.inner, tensors, options)
    else:
        _step_matrices(backend, rule, tensors, options)


def _step_matrices(backend: Backend, rule: InEigenbases, tensors: Tensors, options: StepOptions) -> None:
    if tensors.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step of this rule cannot be part of a CUDA graph: it turns bases at steps that the host decides on. "
            "Take one whose coordinates stay what they are, such as rule='light'"
        )
    plain = [index for index, state in enumerate(tensors.states) if AGE not in state]
    if plain and options.weight_decay:  # a backend multiplies what it moves: in bases, that is not the parameter
        dispatch.step(backend, rule.inner, tensors.select(plain), options)
        tensors = tensors.select([index for index, state in enumerate(tensors.states) if AGE in state])
    sizes = [param.numel() + _copied(rule, param, state) for param, state in zip(tensors.params, tensors.states)]
    with _precise_products(tensors.device):
        for indices in blocks.bundles(sizes, AT_ONCE):
            some = tensors.select(indices)
            if sum(some.counts) > AT_ONCE and rule.coordinates.cut(some.params[0].shape) is not None:
                _step_in_strips(backend, rule, some, options)
            else:
                _step_together(backend, rule, some, options)


@contextmanager
def _precise_products(device: torch.device) -> Iterator[None]:
    """In TF32 or bfloat16, which users may have chosen for their networks, rounding errors would pass for gradients."""
    backends: Any = torch.backends
    products = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    chosen = products.fp32_precision
    if chosen in ("none", "ieee"):
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = chosen


@dataclass(frozen=True)
class _Inside:
    """Matrices in their bases: one, a strip of one, or a stack."""

    own: State
    originals: Sequence[Tensor]
    grad: Tensor
    before: Tensor | None
    """The parameters there, where the rule inside reads them; where not, they count as zero."""
    moved: Tensor
    """What a backend moves."""

    @classmethod
    def enter(
        cls, rule: InEigenbases, params: Sequence[Tensor], grad: Tensor, size: GradientSize, own: State
    ) -> _Inside:
        """Args: grad: ``(..., m, n)``, in range, of as many matrices as there are parameters."""
        before = None
        if rule.inner.reads_param:
            outside = [param.to(grad.dtype).reshape(grad.shape[-2:]) for param in params]
            before = rule.coordinates.enter(_stack(outside), own)
        inside = rule.coordinates.enter_grad(grad, own, size)
        return cls(own, params, inside, before, torch.zeros_like(inside) if before is None else before.clone())

    def leave(self, rule: InEigenbases, options: StepOptions) -> None:
        """Move the parameters as they have moved in the bases. What was moved there is used up."""
        lr = options.lr
        if not isinstance(lr, Tensor) and lr == 0.0:
            return
        move = rule.coordinates.leave(self.moved if self.before is None else self.moved.sub_(self.before), self.own)
        old = _stack([param.to(move.dtype).reshape(move.shape[-2:]) for param in self.originals])
        new = ((1.0 - lr * options.weight_decay) * old).add_(move)
        if isinstance(lr, Tensor):
            new = torch.where(lr == 0, old, new)
        new = _unless(options.skip, new, old)
        pairs = zip(_each(new, self.originals), self.originals)
        _write(self.originals, [value.view(param.shape) for value, param in pairs])


def _step_together(backend: Backend, rule: InEigenbases, tensors: Tensors, options: StepOptions) -> None:
    moved, grads = list(tensors.params), list(tensors.grads)
    entered = []
    for indices in _alike(rule, tensors):
        some = tensors.select(indices)
        shape = as_matrix(some.params[0].shape)
        matrix = in_range(_stack([grad.to(tensors.dtype).reshape(shape) for grad in some.grads]))
        size = GradientSize.of([matrix])
        own = _follow(rule, [matrix], size, some, options.skip)
        inside = _Inside.enter(rule, some.params, matrix, size, own)
        del matrix  # which is as large as what comes now
        entered.append(inside)
        for index, param, room, slope in zip(
            indices, some.params, _each(inside.moved, indices), _each(inside.grad, indices)
        ):
            moved[index], grads[index] = room.view(param.shape), slope.view(param.shape)
    given = replace(tensors, grads=grads, own_grads=tensors.grads, together=tensors.num_together)
    statistics, tensor_state = backend.statistics(rule.inner, given, options.loss)
    # Weight decay is of the parameters as they are, those too that no update reaches.
    backend.update(rule.inner, replace(given, params=moved), statistics, replace(options, weight_decay=0.0))
    dispatch.keep_tensor_state(tensors.states, tensor_state, options.skip)
    for inside in entered:
        inside.leave(rule, options)


def _step_in_strips(backend: Backend, rule: InEigenbases, tensors: Tensors, options: StepOptions) -> None:
    """As :func:`_step_together`, for one tensor that can be cut.

    What fails while strips are moved, as where memory runs out, leaves those before it moved.
    """
    (param,), (grad,), (state,) = tensors.params, tensors.grads, tensors.states
    shape = as_matrix(param.shape)
    matrix = param.reshape(shape)  # a copy only where elements are not in order in memory
    params, slopes = _strips(rule, matrix, shape), _strips(rule, grad.reshape(shape), shape)
    strips = _InRange(slopes, tensors.dtype)
    size = GradientSize.of(strips)
    own = _follow(rule, strips, size, tensors, options.skip)
    pieces = _state_in_strips(rule, state, tensors, shape)
    sums: dict[int, Tensor] = {}

    def total(index: int, of_strip: Tensor) -> Tensor:
        """Of the strips so far, as of the processes where a tensor is sharded: after the last, of the tensor."""
        if index in sums:
            raise NotImplementedError(
                f"the statistics of {type(rule.inner).__name__} add up twice, and a tensor in strips can do so once"
            )
        sums[index] = of_strip
        return torch.stack(list(sums.values())).sum(0)

    def entered() -> Iterator[tuple[_Inside, State, Tensors]]:
        """A strip in the bases, its state, and what a backend is given."""
        for index, (strip, slope, inner, piece) in enumerate(zip(params, slopes, strips, pieces)):
            inside = _Inside.enter(rule, [strip], inner, size, own)
            given = replace(
                tensors,
                params=[strip],
                grads=[inside.grad],
                own_grads=[slope],
                states=[{**state, **{name: values.contiguous() for name, values in piece.items()}}],
                total=partial(total, index),
                together=tensors.num_together,
            )
            yield inside, piece, given

    for _, _, given in entered():
        statistics, tensor_state = backend.statistics(rule.inner, given, options.loss)
    for inside, piece, given in entered():
        given = replace(given, params=[inside.moved])
        backend.update(rule.inner, given, statistics, replace(options, weight_decay=0.0))
        for name, values in piece.items():
            if given.states[0][name] is not values:
                values.copy_(given.states[0][name])
        inside.leave(rule, options)
    dispatch.keep_tensor_state([state], tensor_state, options.skip)
    if matrix.data_ptr() != param.data_ptr():
        param.copy_(matrix.view(param.shape))


def _follow(
    rule: InEigenbases, grad: Iterable[Tensor], size: GradientSize, tensors: Tensors, skip: Tensor | None
) -> State:
    """Let the tensors' own entries follow a gradient, in place, and what else the state has turn with them.

    Args:
        tensors: One, or as many of one age as gradient and size have on their first axis.

    Returns:
        The own entries, stacked.
    """
    states, shape = tensors.states, as_matrix(tensors.params[0].shape)
    names = [name for name in _own_entries(rule.coordinates, shape) if name != AGE]
    own = {name: _stack([state[name] for state in states]) for name in names}
    age = int(states[0][AGE])
    following = next_age(age, age > 0 or _begins(size, skip))
    if not following:
        return own
    after, turns = rule.coordinates.follow(grad, size, own, following)
    for state in states:
        state[AGE].fill_(following)
    for name, value in after.items():
        new = _unless(skip, value, own[name])
        _write([state[name] for state in states], _each(new, states))
        if len(states) > 1:
            own[name] = new
    if turns:
        for pieces in zip(*(_state_in_strips(rule, state, tensors, shape, turning=True) for state in states)):
            whole = {name: _stack([piece[name] for piece in pieces], -3) for name in pieces[0]}
            for name, value in rule.coordinates.carry(whole, turns).items():
                _write([piece[name] for piece in pieces], _each(_unless(skip, value, whole[name]), pieces, -3))
    return own


def _alike(rule: InEigenbases, tensors: Tensors) -> list[list[int]]:
    """Those that have bases, and which of them are stacked: those of one shape, and of one age, that have begun.

    What is stacked is copied several times while bases follow, so that stacks have a limit.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, (param, state) in enumerate(zip(tensors.params, tensors.states)):
        if AGE not in state:
            continue
        age = int(state[AGE])
        stacks = age and _copied(rule, param, state)
        # By dtype, because copies to several at once may take that of the first for all (pytorch/pytorch 173531).
        key = (*as_matrix(param.shape), age, param.dtype) if stacks else (index,)
        found.setdefault(key, []).append(index)
    cut = []
    for indices in found.values():
        first = indices[0]
        size = tensors.params[first].numel() + _copied(rule, tensors.params[first], tensors.states[first])
        pieces = blocks.bundles([size] * len(indices), AT_ONCE // 8)
        cut += [[indices[position] for position in piece] for piece in pieces]
    return cut


def _copied(rule: InEigenbases, param: Tensor, state: State) -> int:
    """How many numbers a tensor's own entries have, where it is small enough to be stacked with them: or 0."""
    if AGE not in state or param.numel() > STACKED:
        return 0
    numbers = sum(_own_entries(rule.coordinates, as_matrix(param.shape)).values())
    return numbers if numbers <= 8 * param.numel() else 0


@lru_cache(maxsize=4096)
def _own_entries(coordinates: Coordinates, shape: tuple[int, int]) -> dict[str, int]:
    """The entries that a tensor has of its own, and how many numbers each has; age counts as none."""
    own = coordinates.initial(shape, None, torch.device("meta"))
    return {name: 0 if name == AGE else values.numel() for name, values in own.items()}


def _stack(values: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One array of several; of one that array itself, without a further axis."""
    return values[0] if len(values) == 1 else torch.stack(list(values), dim)


def _each(stack: Tensor, of: Sequence[object], dim: int = 0) -> Sequence[Tensor]:
    """The reverse of :func:`_stack`."""
    return [stack] if len(of) == 1 else stack.unbind(dim)


def _write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(values))


def _begins(size: GradientSize, skip: Tensor | None) -> bool:
    """Whether this is a tensor's first gradient, if it had none before. The one thing that is asked of a device."""
    found = (size.norm != 0.0).squeeze()
    return bool(found if skip is None else found & ~skip)


def _unless(skip: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if skip is None else torch.where(skip, old, new)


def _strips(rule: InEigenbases, x: Tensor, shape: tuple[int, int]) -> Sequence[Tensor]:
    """Views of ``(..., m, n)``, cut where its bases allow that, else whole."""
    cut = rule.coordinates.cut(shape)
    # The other side is as long as each of the slices that a strip has.
    return [x] if cut is None else x.split(max(1, STRIP // shape[-3 - cut]), cut)


def _state_in_strips(
    rule: InEigenbases, state: State, tensors: Tensors, shape: tuple[int, int], *, turning: bool = False
) -> list[State]:
    """What every coordinate of a matrix has, or what of it turns: a dictionary of views for each strip."""
    layout, spec = state_layout(rule, tensors.dtype, tensors.state_dtype), rule.state_spec()
    names = [name for name, kept in layout.items() if kept.scope == "coordinate"]
    if turning:
        names = [name for name in names if name not in spec or spec[name].starts_at == "zero"]
    whole = (state[name].view(*layout[name].shape, *shape) for name in names)
    return [dict(zip(names, views)) for views in zip(*(_strips(rule, values, shape) for values in whole))]


class _InRange:
    """Strips of a gradient in the dtype that is computed in, each made when its turn comes."""

    def __init__(self, strips: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._strips, self._dtype = strips, dtype

    def __iter__(self) -> Iterator[Tensor]:
        return (in_range(strip.to(self._dtype)) for strip in self._strips)
