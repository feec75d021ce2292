"""The statistics of rules: where they take means over tensors, from sums that a backend takes its own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from learnedopt.kernels.core.base import Tensors
from learnedopt.rules.base import State, StateSpec, UpdateRule


class TakesMeans(Protocol):
    """A rule that takes means, in three steps of which a backend does the second."""

    def state_spec(self) -> dict[str, StateSpec]: ...

    def corrections(self, state: State) -> Tensor:
        """The first rows of the statistics, ``(C, S)``, which follow from the number of steps."""

    def statistics_from_means(
        self, means: Tensor, corrections: Tensor, state: State, together: int
    ) -> tuple[Tensor, State]:
        """What :meth:`~learnedopt.rules.UpdateRule.statistics` gives, from means ``(K, S)``."""


def statistics_from_sums(rule: TakesMeans, tensors: Tensors, sums: Callable[[Tensor], Tensor]) -> tuple[Tensor, State]:
    """What the rule's ``statistics`` gives. The rule computes it, from means that are found elsewhere.

    Args:
        sums: From the corrections ``(C, S)`` to the sums ``(K, S)``, over the coordinates that are here, of what the
            rule takes the means of.
    """
    state = tensor_state(rule, tensors)
    corrections = rule.corrections(state)
    totals = sums(corrections)
    if tensors.total is not None:
        totals = tensors.total(totals)
    means = totals / _counts(tuple(tensors.counts), tensors.dtype, tensors.device)
    return rule.statistics_from_means(means, corrections, state, tensors.num_together)


def statistics_without_coordinates(rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
    """What the ``statistics`` of a rule gives that looks at no coordinate there."""
    none = torch.empty(0, dtype=tensors.dtype, device=tensors.device)
    return rule.statistics(none, none, tensor_state(rule, tensors), tensors.segments, loss)


def tensor_state(rule: UpdateRule | TakesMeans, tensors: Tensors) -> State:
    """What tensors have, ``(*shape, S)``."""
    names = [name for name, spec in rule.state_spec().items() if spec.scope == "tensor"]
    return {name: torch.stack([state[name] for state in tensors.states], dim=-1) for name in names}


@lru_cache(maxsize=64)
def _counts(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because to send them to a device at every step would be to wait for it."""
    return torch.tensor([max(count, 1) for count in counts], dtype=dtype).to(device)
