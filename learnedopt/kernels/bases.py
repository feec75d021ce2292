"""A step of a rule with bases: the tensors are taken there, a backend does what it always does, updates are taken back.

What is in bases costs copies: parameters and gradients there, and the updates, of as many tensors at once as have
together :data:`AT_ONCE` coordinates. A tensor that has more is worked on in strips along the side that has no basis, if
one has none: once for what the rule has to know of the whole, and once to move it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels import blocks
from learnedopt.kernels.base import Backend, Tensors
from learnedopt.kernels.dispatch import keep_tensor_state, step
from learnedopt.kernels.state import state_layout
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
    """As :func:`~learnedopt.kernels.dispatch.step`, for tensors that have bases, and in them.

    Their states have, beside what backends know of, the rule's matrices and :data:`AGE`.

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
    with _precise_products(tensors.device):
        for indices in blocks.bundles(tensors.counts, AT_ONCE):
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
    bases, params, grads = [], [], []
    for param, grad, state in zip(tensors.params, tensors.grads, tensors.states):
        matrix = in_range(grad.to(tensors.dtype)).reshape(as_matrix(grad.shape))
        size = GradientSize.of([matrix])
        here = _follow(rule, [matrix], size, as_matrix(grad.shape), state, tensors, skip)
        bases.append(here)
        params.append(here.enter(param.to(tensors.dtype).reshape(matrix.shape)).view(param.shape))
        grads.append(above_rounding(here.enter(matrix), size).view(param.shape))
    moved = [param.clone() for param in params]
    step(
        backend,
        rule.inner,
        replace(tensors, params=moved, grads=grads, together=tensors.num_together),
        lr=lr,
        weight_decay=0.0,  # which is of the parameters as they are, those too that no update reaches
        loss=loss,
        skip=skip,
    )
    del matrix, grads
    for here, param, before, after in zip(bases, tensors.params, params, moved):
        _take_back(here, param, before, after, lr, weight_decay, skip)


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
    here = _follow(rule, strips, size, shape, state, tensors, skip)
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
        backend.update(rule.inner, given, statistics, lr=lr, weight_decay=0.0, skip=skip)
        for name, values in piece.items():
            if given.states[0][name] is not values:
                values.copy_(given.states[0][name])
        _take_back(here, strip, before, given.params[0], lr, weight_decay, skip)
    keep_tensor_state([state], tensor_state, skip)
    if matrix.data_ptr() != param.data_ptr():
        param.copy_(matrix.view(param.shape))


def _take_back(
    here: Bases,
    param: Tensor,
    before: Tensor,
    after: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    skip: Tensor | None,
) -> None:
    """Move parameters, a tensor or a strip of one, as they have moved in the bases. ``after`` is used up."""
    if not isinstance(lr, Tensor) and lr == 0.0:
        return
    shape = as_matrix(param.shape)
    delta = here.leave(after.sub_(before).view(shape)).reshape(param.shape)
    new = ((1.0 - lr * weight_decay) * param.to(before.dtype)).add_(delta)
    if isinstance(lr, Tensor):
        new = torch.where(lr == 0, param, new)
    param.copy_(new if skip is None else torch.where(skip, param, new))


def _follow(
    rule: EigenbasisRule,
    grad: Iterable[Tensor],
    size: GradientSize,
    shape: tuple[int, int],
    state: State,
    tensors: Tensors,
    skip: Tensor | None,
) -> Bases:
    """Let the matrices follow a gradient, in place, and what else the state has turn with them."""
    matrices = {name: state[name] for name in rule.matrices(shape)}
    if not state[AGE] and not _begins(size, skip):
        return Bases(matrices)
    state[AGE] += 1
    after, turns = rule.followed(grad, size, matrices, int(state[AGE]))
    for name, value in after.items():
        matrices[name].copy_(_unless(skip, value, matrices[name]))
    if turns:
        for piece in _state_in_strips(rule, state, tensors, shape):
            for name, value in rule.carried(piece, turns).items():
                piece[name].copy_(_unless(skip, value, piece[name]))
    return Bases(matrices)


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
