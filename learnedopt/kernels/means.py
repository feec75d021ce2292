"""The statistics of rules: where they take means over tensors, from sums that a backend takes its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from learnedopt.kernels.base import Tensors
from learnedopt.rules import AdamLSTMRule, ScheduleFreeLSTMRule, Segments, State, UpdateRule

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
    """How many means it takes."""


ADAM_LSTM = Form(("fast", "slow", "square"), corrections=3, sums=3)
"""The means are those of the squared parameter, ``a * g`` and ``b ** 2``."""
SCHEDULE_FREE_LSTM = Form(("momentum", "square", "offset", "origin"), corrections=3, sums=8)
"""The means are those of the squared parameter, ``a * g``, ``a ** 2``, ``offset ** 2``, ``offset * a``, and, of the
gradient and the way from the parameter to its origin, both clamped, the product and the squares."""
FORMS: dict[type[UpdateRule], Form] = {AdamLSTMRule: ADAM_LSTM, ScheduleFreeLSTMRule: SCHEDULE_FREE_LSTM}


def statistics_from_sums(rule: TakesMeans, tensors: Tensors, sums: Callable[[Tensor], Tensor]) -> tuple[Tensor, State]:
    """What the rule's ``statistics`` gives. The rule computes it, from means that are found elsewhere.

    Args:
        sums: From the corrections ``(C, S)`` to the sums ``(K, S)``, over the coordinates that are here, of what the
            rule takes the means of, with ``C`` and ``K`` as in its :class:`Form`.
    """
    form = FORMS[type(rule)]
    means = _KnownMeans(torch.zeros(form.sums, len(tensors.params), dtype=tensors.dtype, device=tensors.device))
    means.together = tensors.num_together
    none = means.values.new_empty(0)
    state = dict.fromkeys(form.numbers, none) | _tensor_state(rule, tensors)
    totals = sums(rule.corrections(state))
    if tensors.total is not None:
        totals = tensors.total(totals)
    means.values = totals / _counts(tuple(tensors.counts), tensors.dtype, tensors.device)
    return rule.statistics(none, none, state, means)


def statistics_without_coordinates(rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
    """What the ``statistics`` of a rule gives that looks at no coordinate there."""
    none = torch.empty(0, dtype=tensors.dtype, device=tensors.device)
    return rule.statistics(none, none, _tensor_state(rule, tensors), tensors.segments, loss)


def _tensor_state(rule: UpdateRule, tensors: Tensors) -> State:
    """What tensors have, ``(*shape, S)``."""
    names = [name for name, spec in rule.state_spec().items() if spec.scope == "tensor"]
    return {name: torch.stack([state[name] for state in tensors.states], dim=-1) for name in names}


class _KnownMeans(Segments):
    """Segments of tensors that are not here, whose means are known."""

    def __init__(self, values: Tensor) -> None:
        super().__init__([0] * values.shape[1])
        self.values = values

    def mean(self, x: Tensor) -> Tensor:
        return self.values


@lru_cache(maxsize=64)
def _counts(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because to send them to a device at every step would be to wait for it."""
    return torch.tensor([max(count, 1) for count in counts], dtype=dtype).to(device)
