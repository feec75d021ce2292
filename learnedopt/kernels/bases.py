"""A step of a rule with bases: the tensors are taken there, a backend does what it always does, updates are taken back.

What is in bases costs copies: parameters and gradients there, and the updates, of as many tensors at once as have
together :data:`AT_ONCE` coordinates. A tensor that has more is worked on in strips along the side that has no basis, if
one has none: once for what the rule has to know of the whole, and once to move it. Small ones of one shape are stacked,
because what their products cost is the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels.core import blocks
from learnedopt.kernels.core.base import Backend, StepOptions, Tensors
from learnedopt.kernels.core.dispatch import keep_tensor_state, step
from learnedopt.kernels.core.state import state_layout
from learnedopt.rules import EigenbasisRule, State, UpdateRule
from learnedopt.rules.eigenbasis import Bases, GradientSize, above_rounding, as_matrix
from learnedopt.rules.moments import in_range

AGE = "age"
"""The entry of a tensor's state that says how many steps its bases have seen, from its first gradient that is not zero:
on the host, which decides by it. Later steps that a device skips count too, since the host does not know."""
AT_ONCE = 3 << 20
"""Coordinates that are taken into bases at once, and above which a tensor is cut: five copies of them in float32 are
less than 64 MiB."""
STRIP = AT_ONCE // 4
"""Coordinates of a strip, of which state may be copied too."""
STACKED = 1 << 16
"""Coordinates above which a tensor is not stacked with others: its products take longer than the calls for them."""


@torch.compiler.disable(reason="the host decides at which steps bases follow")
def step_in_bases(
    backend: Backend,
    rule: UpdateRule,
    tensors: Tensors,
    *,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """As :func:`~learnedopt.kernels.step`, in the bases of those tensors that have any.

    Their states have, beside what backends know of, the rule's matrices and :data:`AGE`. Others are moved as they are.

    Args:
        backend: One that serves ``rule.inner``.

    Raises:
        TypeError: the rule has matrices, and is no :class:`~learnedopt.rules.EigenbasisRule`.
        RuntimeError: a CUDA graph is being captured. Nothing has changed.
    """
    if not isinstance(rule, EigenbasisRule):
        raise TypeError(
            f"{type(rule).__name__} has matrices of its own, and optimizers know only how those of EigenbasisRule "
            "follow gradients: derive the rule from that one, or call rule.update"
        )
    if tensors.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step of this rule cannot be part of a CUDA graph: it turns bases at steps that the host decides on. "
            "Take one whose coordinates stay what they are, such as rule='light'"
        )
    if tensors.device.type == "cpu":
        if skip is not None and skip:
            return
        lr, skip = float(lr), None
    if weight_decay:  # a backend multiplies the coordinates it is given, which in bases are not the parameters'
        plain = [index for index, state in enumerate(tensors.states) if AGE not in state]
        inside = [index for index, state in enumerate(tensors.states) if AGE in state]
        if plain:
            step(backend, rule.inner, tensors.select(plain), StepOptions(lr, weight_decay, loss, skip))
            if not inside:
                return
            tensors = tensors.select(inside)
    sizes = [param.numel() + _copied(rule, param, state) for param, state in zip(tensors.params, tensors.states)]
    with _precise_products(tensors.device):
        for indices in blocks.bundles(sizes, AT_ONCE):
            some = tensors.select(indices)
            in_strips = sum(some.counts) > AT_ONCE and len(rule.sides(some.params[0].shape)) == 1
            take = _step_in_strips if in_strips else _step_together
            take(backend, rule, some, lr, weight_decay, loss, skip)


def initial_matrices(rule: UpdateRule, param: Tensor, dtype: torch.dtype) -> State:
    """What a tensor's state begins with, beside what backends know of. Empty if it has no bases."""
    found: State = {}
    for name, (rows, columns) in rule.matrices(param.shape).items():
        make = torch.eye if name.endswith("_basis") else torch.zeros
        found[name] = make(rows, columns, dtype=dtype, device=param.device)
    return {**found, AGE: torch.zeros((), dtype=dtype)} if found else {}


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


def _step_together(
    backend: Backend,
    rule: EigenbasisRule,
    tensors: Tensors,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None,
    skip: Tensor | None,
) -> None:
    params, grads = list(tensors.params), list(tensors.grads)

    def enter(indices: Sequence[int]) -> tuple[Bases, Sequence[Tensor], Tensor, Tensor]:
        """Those that are alike, in bases: their own, what they are there, and the copy of it that a backend moves."""
        some = tensors.select(indices)
        shape = as_matrix(some.params[0].shape)
        matrix = in_range(_stack([grad.to(tensors.dtype).reshape(shape) for grad in some.grads]))
        size = GradientSize.of([matrix])
        here = _follow(rule, [matrix], size, shape, some.states, tensors, skip)
        before = here.enter(_stack([param.to(tensors.dtype).reshape(shape) for param in some.params]))
        turned = above_rounding(here.enter(matrix), size)
        del matrix  # which is as large as what comes now
        after = before.clone()
        for index, param, own, slope in zip(indices, some.params, _each(after, indices), _each(turned, indices)):
            params[index], grads[index] = own.view(param.shape), slope.view(param.shape)
        return here, some.params, before, after

    entered = [enter(indices) for indices in _alike(rule, tensors)]
    step(
        backend,
        rule.inner,
        replace(tensors, params=params, grads=grads, together=tensors.num_together),
        # Without decay, which is of the parameters as they are, those too that no update reaches.
        StepOptions(lr, 0.0, loss, skip),
    )
    grads.clear()  # to have room for what is taken back
    for here, originals, before, after in entered:
        _take_back(here, originals, before, after, lr, weight_decay, skip)


def _step_in_strips(
    backend: Backend,
    rule: EigenbasisRule,
    tensors: Tensors,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None,
    skip: Tensor | None,
) -> None:
    """As :func:`_step_together`, for one tensor of which one side has no basis.

    What fails while strips are moved, as where memory runs out, leaves those before it moved.
    """
    (param,), (grad,), (state,) = tensors.params, tensors.grads, tensors.states
    shape = as_matrix(param.shape)
    matrix = param.reshape(shape)  # a copy only where elements are not in order in memory
    params = _strips(rule, matrix, shape)
    strips = _InRange(_strips(rule, grad.reshape(shape), shape), tensors.dtype)
    size = GradientSize.of(strips)
    here = _follow(rule, strips, size, shape, [state], tensors, skip)
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

    def entered() -> Iterator[tuple[Tensor, Tensor, State, Tensors]]:
        """A strip of the parameters, the same in the bases, its state, and what a backend is given."""
        for index, (strip, slope, piece) in enumerate(zip(params, strips, pieces)):
            before = here.enter(strip.to(tensors.dtype))
            own = {**state, **{name: values.contiguous() for name, values in piece.items()}}
            slope = above_rounding(here.enter(slope), size)
            given = replace(
                tensors,
                params=[before.clone()],
                grads=[slope],
                states=[own],
                total=partial(total, index),
                together=tensors.num_together,
            )
            yield strip, before, piece, given

    for _, _, _, given in entered():
        statistics, tensor_state = backend.statistics(rule.inner, given, loss)
    for strip, before, piece, given in entered():
        backend.update(rule.inner, given, statistics, StepOptions(lr, 0.0, loss, skip))
        for name, values in piece.items():
            if given.states[0][name] is not values:
                values.copy_(given.states[0][name])
        _take_back(here, [strip], before, given.params[0], lr, weight_decay, skip)
    keep_tensor_state([state], tensor_state, skip)
    if matrix.data_ptr() != param.data_ptr():
        param.copy_(matrix.view(param.shape))


def _take_back(
    here: Bases,
    params: Sequence[Tensor],
    before: Tensor,
    after: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    skip: Tensor | None,
) -> None:
    """Move parameters as they have moved in the bases: one, a strip of one, or a stack. ``after`` is used up."""
    if not isinstance(lr, Tensor) and lr == 0.0:
        return
    delta = here.leave(after.sub_(before).view(before.shape))
    old = _stack([param.to(before.dtype).reshape(as_matrix(param.shape)) for param in params])
    new = ((1.0 - lr * weight_decay) * old).add_(delta)
    if isinstance(lr, Tensor):
        new = torch.where(lr == 0, old, new)
    new = _unless(skip, new, old)
    _write(params, [value.view(param.shape) for value, param in zip(_each(new, params), params)])


def _follow(
    rule: EigenbasisRule,
    grad: Iterable[Tensor],
    size: GradientSize,
    shape: tuple[int, int],
    states: Sequence[State],
    tensors: Tensors,
    skip: Tensor | None,
) -> Bases:
    """Let the matrices follow a gradient, in place, and what else the state has turn with them.

    Args:
        states: Of one tensor, or of as many of one age as gradient and size have on their first axis.
    """
    matrices = {name: _stack([state[name] for state in states]) for name in rule.matrices(shape)}
    if not states[0][AGE] and not _begins(size, skip):
        return Bases(matrices)
    for state in states:
        state[AGE] += 1
    after, turns = rule.followed(grad, size, matrices, int(states[0][AGE]))
    for name, value in after.items():
        new = _unless(skip, value, matrices[name])
        _write([state[name] for state in states], _each(new, states))
        if len(states) > 1:
            matrices[name] = new
    if turns:
        for pieces in zip(*(_state_in_strips(rule, state, tensors, shape) for state in states)):
            whole = {name: _stack([piece[name] for piece in pieces], -3) for name in pieces[0]}
            for name, value in rule.carried(whole, turns).items():
                _write([piece[name] for piece in pieces], _each(_unless(skip, value, whole[name]), pieces, -3))
    return Bases(matrices)


def _alike(rule: EigenbasisRule, tensors: Tensors) -> list[list[int]]:
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


def _copied(rule: EigenbasisRule, param: Tensor, state: State) -> int:
    """How many numbers a tensor's matrices have, where it is small enough to be copied into a stack with them: or 0."""
    if AGE not in state or param.numel() > STACKED:
        return 0
    matrices = sum(2 * length * length for length in rule.sides(param.shape).values())
    return matrices if matrices <= 8 * param.numel() else 0


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


def _strips(rule: EigenbasisRule, x: Tensor, shape: tuple[int, int]) -> Sequence[Tensor]:
    """Views of ``(..., m, n)``, cut along the side that has no basis; whole where both have one."""
    sides = rule.sides(shape)
    if len(sides) == 2:
        return [x]
    rows, columns = shape
    return x.split(max(1, STRIP // rows), -1) if "left" in sides else x.split(max(1, STRIP // columns), -2)


def _state_in_strips(rule: EigenbasisRule, state: State, tensors: Tensors, shape: tuple[int, int]) -> list[State]:
    """What every coordinate of a matrix has, a dictionary of views for each strip."""
    layout = state_layout(rule, tensors.dtype, tensors.state_dtype)
    names = [name for name, spec in layout.items() if spec.scope == "coordinate"]
    whole = (state[name].view(*layout[name].shape, *shape) for name in names)
    return [dict(zip(names, views)) for views in zip(*(_strips(rule, values, shape) for values in whole))]


class _InRange:
    """Strips of a gradient in the dtype that is computed in, each made when its turn comes."""

    def __init__(self, strips: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._strips, self._dtype = strips, dtype

    def __iter__(self) -> Iterator[Tensor]:
        return (in_range(strip.to(self._dtype)) for strip in self._strips)
