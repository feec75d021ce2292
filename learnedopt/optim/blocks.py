"""One step of a rule on a list of parameters, in blocks of bounded size.

This is the plain implementation that runs everywhere. Whatever the tensors' sizes, layouts and dtypes, the rule sees
flat vectors: small tensors lie side by side in one block, a tensor too large for a block is cut into slices. How
they are cut changes nothing but the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from learnedopt.optim.sharding import is_distributed, largest_shard, local_parts, segments_of
from learnedopt.rules import Segments, State, UpdateRule

BLOCK = 8192
"""Coordinates a rule works on at once: enough to hide the cost of a call, few enough to bound its memory."""


def update_in_blocks(
    rule: UpdateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    dtype: torch.dtype,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    r"""Move ``params`` and advance ``states`` by one step of ``rule``, in place.

    .. math::
        \theta \leftarrow (1 - \eta\lambda)\,\theta + \eta\, \Delta(\theta, g)

    with :math:`\eta` = ``lr`` and :math:`\lambda` = ``weight_decay``. Each parameter is rounded to its own dtype
    once, at the end.

    Args:
        rule: On the parameters' device, in ``dtype``.
        params, grads: Real tensors of one device, of any shape, strides and floating-point dtype. If they are spread
            over processes, then all alike.
        states: Per parameter, contiguous and in ``dtype``: ``(*spec.shape, *param.shape)``, spread as the parameter
            is, or ``spec.shape`` for tensor-scope entries.
        dtype: What to compute in.
        lr: A tensor is 0-d and on the parameters' device.
        loss: The training loss, 0-d and on the parameters' device.
        skip: Where true, everything stays as it is bit for bit. 0-d, boolean and on the parameters' device.
    """
    sizes = [largest_shard(param) for param in params]
    for indices in _bundles(sizes, BLOCK):
        bundle = [params[i] for i in indices], [grads[i] for i in indices], [states[i] for i in indices]
        segments = segments_of(bundle[0])
        if is_distributed(bundle[0][0]):
            bundle = local_parts(*bundle)
        if sizes[indices[0]] > BLOCK:
            (param,), (grad,), (state,) = bundle
            _update_large(rule, param, grad, state, segments, dtype, lr, weight_decay, loss, skip)
        else:
            _update_small(rule, *bundle, segments, dtype, lr, weight_decay, loss, skip)


def _bundles(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of the tensors to work on together: several of at most ``limit`` coordinates in all, or a larger one."""
    bundle: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if size > limit:
            yield [index]
            continue
        if total + size > limit:
            yield bundle
            bundle, total = [], 0
        bundle.append(index)
        total += size
    if bundle:
        yield bundle


def _update_small(
    rule: UpdateRule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    segments: Segments,
    dtype: torch.dtype,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None,
    skip: Tensor | None,
) -> None:
    """Tensors that fit into one block together."""
    param, grad = _gather(params).to(dtype), _gather(grads).to(dtype)
    state = {name: _gather([s[name] for s in states], spec.shape) for name, spec in rule.state_spec().items()}
    statistics, tensor_state = rule.statistics(param, grad, state, segments, loss)
    delta, coordinate_state = rule(param, grad, state, segments.expand(statistics))
    _scatter(_unless(skip, _moved(param, delta, lr, weight_decay), param), params)
    for name, values in {**tensor_state, **coordinate_state}.items():
        _scatter(_unless(skip, values, state[name]), [s[name] for s in states])


def _update_large(
    rule: UpdateRule,
    param: Tensor,
    grad: Tensor,
    state: State,
    segments: Segments,
    dtype: torch.dtype,
    lr: float | Tensor,
    weight_decay: float,
    loss: Tensor | None,
    skip: Tensor | None,
) -> None:
    """A tensor larger than a block: statistics of the whole, then slice by slice."""
    flat_param, flat_grad = param.reshape(-1), grad.reshape(-1)
    # view, not reshape: what is written below must reach the state itself.
    flat_state = {name: state[name].view(*spec.shape, -1) for name, spec in rule.state_spec().items()}
    statistics, tensor_state = rule.statistics(flat_param.to(dtype), flat_grad.to(dtype), flat_state, segments, loss)
    for start in range(0, param.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        here = flat_param[block].to(dtype)
        memory = {name: values[..., block] for name, values in flat_state.items() if name not in tensor_state}
        delta, coordinate_state = rule(here, flat_grad[block].to(dtype), memory, statistics)
        flat_param[block] = _unless(skip, _moved(here, delta, lr, weight_decay), here)
        for name, values in coordinate_state.items():
            memory[name].copy_(_unless(skip, values, memory[name]))
    for name, values in tensor_state.items():
        flat_state[name].copy_(_unless(skip, values, flat_state[name]))
    if not param.is_contiguous():  # then flat_param may be a copy
        param.copy_(flat_param.view(param.shape))


def _moved(param: Tensor, delta: Tensor, lr: float | Tensor, weight_decay: float) -> Tensor:
    """The new parameters. At ``lr=0`` the old ones bit for bit, even if the update is not finite."""
    moved = param * (1.0 - lr * weight_decay) + lr * delta
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, param, moved)
    return moved if lr else param


def _unless(skip: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if skip is None else torch.where(skip, old, new)


def _gather(tensors: list[Tensor], lead: tuple[int, ...] = ()) -> Tensor:
    """Tensors ``(*lead, ...)`` side by side along one last axis; not a copy where there is only one."""
    flat = [tensor.reshape(*lead, -1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def _scatter(values: Tensor, tensors: list[Tensor]) -> None:
    """Write ``(*lead, N)`` back into the tensors it was gathered from."""
    lead = values.shape[:-1].numel()
    for tensor, part in zip(tensors, values.split([t.numel() // lead for t in tensors], dim=-1)):
        tensor.copy_(part.reshape(tensor.shape))
