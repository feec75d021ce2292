"""The statistics of rules: where they take means over tensors, from sums that a backend takes its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from learnedopt.kernels.base import Tensors
from learnedopt.rules import AdamLSTMRule, ScheduleFreeLSTMRule, State, UpdateRule

TakesMeans = AdamLSTMRule | ScheduleFreeLSTMRule
"""The rules that take means."""


@dataclass(frozen=True)
class Form:
    """What such a rule takes the means of."""

    numbers: tuple[str, ...]
    """The entries of its state that are one number per coordinate."""
    corrections: int
    """The first rows of the statistics, which follow from the number of steps; the others follow from the means."""
    sums: int
    """How many means it takes; its ``statistics_from_means`` says of what."""


ADAM_LSTM = Form(("fast", "slow", "square"), corrections=3, sums=3)
SCHEDULE_FREE_LSTM = Form(("momentum", "square", "offset", "origin"), corrections=3, sums=8)
FORMS: dict[type[UpdateRule], Form] = {AdamLSTMRule: ADAM_LSTM, ScheduleFreeLSTMRule: SCHEDULE_FREE_LSTM}


def statistics_from_sums(rule: TakesMeans, tensors: Tensors, sums: Callable[[Tensor], Tensor]) -> tuple[Tensor, State]:
    """What the rule's ``statistics`` gives. The rule computes it, from means that are found elsewhere.

    Args:
        sums: From the corrections ``(C, S)`` to the sums ``(K, S)``, over the coordinates that are here, of what the
            rule takes the means of, with ``C`` and ``K`` as in its :class:`Form`.
    """
    state = _tensor_state(rule, tensors)
    corrections = rule.corrections(state)
    totals = sums(corrections)
    if tensors.total is not None:
        totals = tensors.total(totals)
    means = totals / _counts(tuple(tensors.counts), tensors.dtype, tensors.device)
    return rule.statistics_from_means(means, corrections, state, tensors.num_together)


def statistics_without_coordinates(rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
    """What the ``statistics`` of a rule gives that looks at no coordinate there."""
    none = torch.empty(0, dtype=tensors.dtype, device=tensors.device)
    return rule.statistics(none, none, _tensor_state(rule, tensors), tensors.segments, loss)


def _tensor_state(rule: UpdateRule, tensors: Tensors) -> State:
    """What tensors have, ``(*shape, S)``."""
    names = [name for name, spec in rule.state_spec().items() if spec.scope == "tensor"]
    return {name: torch.stack([state[name] for state in tensors.states], dim=-1) for name in names}


@lru_cache(maxsize=64)
def _counts(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because to send them to a device at every step would be to wait for it."""
    return torch.tensor([max(count, 1) for count in counts], dtype=dtype).to(device)
