"""A step of a rule with bases: the tensors are taken there, a backend does what it always does, updates are taken back.

What is in bases costs copies: parameters and gradients there, and the updates, of as many tensors at once as have
together :data:`AT_ONCE` coordinates, or of one that has more; and when bases turn, what turns with them, of one tensor
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels import blocks
from learnedopt.kernels.base import Backend, Tensors
from learnedopt.kernels.dispatch import step
from learnedopt.kernels.state import state_layout
from learnedopt.rules import EigenbasisRule, State, UpdateRule
from learnedopt.rules.eigenbasis import Bases, above_rounding, as_matrix
from learnedopt.rules.moments import in_range

AGE = "age"
"""The entry of a tensor's state that says how many steps its bases have seen, from its first gradient that is not zero:
on the host, which decides by it. Later steps that a device skips count too, since the host does not know."""
AT_ONCE = 1 << 22


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
            _step_together(backend, rule, tensors.select(indices), lr, weight_decay, loss, skip)


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
        here = _follow(rule, matrix, state, tensors, skip)
        bases.append(here)
        params.append(here.enter(param.to(tensors.dtype).reshape(matrix.shape)).view(param.shape))
        grads.append(above_rounding(here.enter(matrix), matrix).view(param.shape))
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
    if not isinstance(lr, Tensor) and lr == 0.0:
        return
    for here, param, before, after in zip(bases, tensors.params, params, moved):
        delta = here.leave((after - before).view(as_matrix(param.shape))).reshape(param.shape)
        new = (1.0 - lr * weight_decay) * param.to(tensors.dtype) + delta
        if isinstance(lr, Tensor):
            new = torch.where(lr == 0, param, new)
        param.copy_(new if skip is None else torch.where(skip, param, new))


def _follow(rule: EigenbasisRule, grad: Tensor, state: State, tensors: Tensors, skip: Tensor | None) -> Bases:
    """Let the matrices follow a gradient ``(m, n)``, in place, and what else the state has turn with them."""
    matrices = {name: state[name] for name in rule.matrices(grad.shape)}
    if not state[AGE] and not _begins(grad, skip):
        return Bases(matrices)
    state[AGE] += 1
    after, turns = rule.followed(grad, matrices, int(state[AGE]))
    for name, value in after.items():
        matrices[name].copy_(_unless(skip, value, matrices[name]))
    if turns:
        layout = state_layout(rule, tensors.dtype, tensors.state_dtype)
        coordinates = {
            name: state[name].view(*spec.shape, *grad.shape)
            for name, spec in layout.items()
            if spec.scope == "coordinate"
        }
        for name, value in rule.carried(coordinates, turns).items():
            coordinates[name].copy_(_unless(skip, value, coordinates[name]))
    return Bases(matrices)


def _begins(grad: Tensor, skip: Tensor | None) -> bool:
    """Whether this is a tensor's first gradient, if it had none before. The one thing that is asked of a device."""
    found = grad.any()
    return bool(found if skip is None else found & ~skip)


def _unless(skip: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if skip is None else torch.where(skip, old, new)
