"""The reference: the rule itself, on blocks of bounded size.

It serves every rule on every device. Whatever the tensors' sizes, layouts and dtypes, the rule sees flat vectors: small
tensors lie side by side in one block, a tensor too large for a block is cut into slices. How they are cut changes
nothing but the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from learnedopt.kernels.core import blocks
from learnedopt.kernels.core.base import Backend, Case, StepOptions, Tensors
from learnedopt.kernels.core.state import keep_state, read_state, state_layout
from learnedopt.rules.base import State, UpdateRule


class ReferenceBackend(Backend):
    """The rule's own :meth:`~learnedopt.rules.UpdateRule.statistics` and ``forward``."""

    name: ClassVar[str] = "reference"

    def refusal(self, case: Case) -> str | None:
        return None

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        if type(rule).statistics is UpdateRule.statistics:
            return torch.empty(0, len(tensors.params), dtype=tensors.dtype, device=tensors.device), {}
        layout = state_layout(rule, tensors.dtype, tensors.state_dtype)
        order: list[int] = []
        parts: list[tuple[Tensor, State]] = []
        # By the sizes of whole tensors, not of shards: every process must make the same bundles.
        for indices in blocks.bundles(tensors.counts, blocks.BLOCK):
            here = tensors.select(indices)
            param, grad = gather(here.params).to(tensors.dtype), gather(here.grads).to(tensors.dtype)
            stored = {name: gather([state[name] for state in here.states], spec.shape) for name, spec in layout.items()}
            state = read_state(stored, rule.state_spec(), tensors.dtype)
            own: dict[str, Tensor] = {}
            if here.own_grads is not None:
                own_grad = gather(here.own_grads).to(tensors.dtype)
                own["own_grad"] = -own_grad if tensors.maximize else own_grad
            grad = -grad if tensors.maximize else grad
            parts.append(rule.statistics(param, grad, state, here.segments, loss, **own))
            order += indices

        def arranged(values: Iterable[Tensor]) -> Tensor:
            columns = dict(zip(order, torch.cat(list(values), dim=-1).unbind(-1)))
            return torch.stack([columns[index] for index in range(len(order))], dim=-1)

        return arranged(statistics for statistics, _ in parts), {
            name: arranged(state[name] for _, state in parts) for name in parts[0][1]
        }

    def update(self, rule: UpdateRule, tensors: Tensors, statistics: Tensor, options: StepOptions) -> None:
        layout = state_layout(rule, tensors.dtype, tensors.state_dtype)
        # What starts at the parameters stays, and no rule's forward reads it.
        moving = {name: spec for name, spec in layout.items() if spec.starts_at == "zero"}
        lead = {name: spec.shape for name, spec in moving.items() if spec.scope == "coordinate"}
        spec = {name: spec for name, spec in rule.state_spec().items() if name in lead}
        for params, grads, states, own in _blocks(tensors, statistics, lead):
            param, grad = gather(params).to(tensors.dtype), gather(grads).to(tensors.dtype)
            stored = {name: gather([state[name] for state in states], shape) for name, shape in lead.items()}
            memory = read_state(stored, spec, tensors.dtype)
            delta, memory = rule(param, -grad if tensors.maximize else grad, memory, own)
            scatter(_unless(options.skip, _moved(param, delta, options), param), params)
            for name, values in keep_state(memory, layout).items():
                scatter(_unless(options.skip, values, stored[name]), [state[name] for state in states])


Block = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[State], Tensor]


def _blocks(tensors: Tensors, statistics: Tensor, lead: Mapping[str, tuple[int, ...]]) -> Iterator[Block]:
    """Parameters, gradients and state of a block each, to be written, and the statistics of its coordinates."""
    columns = statistics.unbind(-1)
    for indices in blocks.bundles([param.numel() for param in tensors.params], blocks.BLOCK):
        here, own = tensors.select(indices), torch.stack([columns[index] for index in indices], dim=-1)
        if here.params[0].numel() <= blocks.BLOCK:
            yield here.params, here.grads, here.states, here.segments.expand(own)
            continue
        # view, not reshape: what is written must reach the state itself.
        state = {name: here.states[0][name].view(*lead[name], -1) for name in lead}
        for (param, grad), start in blocks.pieces([here.params[0], here.grads[0]], blocks.BLOCK):
            part = slice(start, start + param.numel())
            yield [param], [grad], [{name: values[..., part] for name, values in state.items()}], own


def _moved(param: Tensor, delta: Tensor, options: StepOptions) -> Tensor:
    """The new parameters. At ``lr=0`` the old ones bit for bit, even if the update is not finite."""
    lr = options.lr
    moved = param * (1.0 - lr * options.weight_decay) + lr * delta
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, param, moved)
    return moved if lr else param


def _unless(skip: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if skip is None else torch.where(skip, old, new)


def gather(tensors: Sequence[Tensor], lead: tuple[int, ...] = ()) -> Tensor:
    """Tensors ``(*lead, ...)`` side by side along one last axis; not a copy where there is only one."""
    flat = [tensor.reshape(*lead, -1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def scatter(values: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write ``(*lead, n)`` back into the tensors it was gathered from."""
    lead = values.shape[:-1].numel()
    for tensor, part in zip(tensors, values.split([t.numel() // lead for t in tensors], dim=-1)):
        tensor.copy_(part.reshape(tensor.shape))
