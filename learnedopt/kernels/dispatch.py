"""One step of a rule on a list of tensors, by whichever backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnedopt.kernels.base import Backend, Tensors
from learnedopt.rules import State, UpdateRule


def step(
    backend: Backend,
    rule: UpdateRule,
    tensors: Tensors,
    *,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    r"""Move parameters and advance their state by one step of ``rule``, in place.

    .. math::
        \theta \leftarrow (1 - \eta\lambda)\,\theta + \eta\, \Delta(\theta, g)

    with :math:`\eta` = ``lr`` and :math:`\lambda` = ``weight_decay``.

    Args:
        backend: One that can serve, from :func:`~learnedopt.kernels.choose`.
        rule: Frozen, on the tensors' device, in the dtype that is computed in.
        lr: A tensor is 0-d and on the tensors' device.
        loss: The training loss, 0-d and on the tensors' device.
        skip: Where true, everything stays as it is bit for bit. 0-d, boolean and on the tensors' device.
    """
    if torch.compiler.is_compiling() and backend.name != "reference":
        _step_outside_the_graph(backend, rule, tensors, lr=lr, weight_decay=weight_decay, loss=loss, skip=skip)
        return
    # The host reads its own memory without waiting; a compiler, though, wants tensors to stay tensors.
    if tensors.device.type == "cpu" and not torch.compiler.is_compiling():
        lr = float(lr)
        if skip is not None and skip:
            return
        skip = None
    statistics, tensor_state = backend.statistics(rule, tensors, loss)
    backend.update(rule, tensors, statistics, lr=lr, weight_decay=weight_decay, skip=skip)
    keep_tensor_state(tensors.states, tensor_state, skip)


def keep_tensor_state(states: Sequence[State], tensor_state: State, skip: Tensor | None) -> None:
    """Write the tensor-scope state that :meth:`~learnedopt.kernels.Backend.statistics` gave, unless to be skipped."""
    for name, values in tensor_state.items():
        kept = [state[name] for state in states]
        new = values if skip is None else torch.where(skip, torch.stack(kept, dim=-1), values)
        torch._foreach_copy_(kept, list(new.unbind(-1)))


@torch.compiler.disable(reason="blocked, native and triton are kernels of their own, and are not compiled once more")
def _step_outside_the_graph(backend: Backend, rule: UpdateRule, tensors: Tensors, **options: Any) -> None:
    step(backend, rule, tensors, **options)
