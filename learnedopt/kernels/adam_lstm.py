"""The statistics of :class:`~learnedopt.rules.AdamLSTMRule`, from sums that a backend takes its own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from learnedopt.kernels.base import Tensors
from learnedopt.rules import AdamLSTMRule, Segments, State

MOMENTS = ("fast", "slow", "square")
CORRECTIONS = 3
"""The first rows of the statistics; the others are features that all coordinates of a tensor share."""


def statistics_from_sums(
    rule: AdamLSTMRule, tensors: Tensors, sums: Callable[[Tensor], Tensor]
) -> tuple[Tensor, State]:
    """What :meth:`AdamLSTMRule.statistics` gives. The rule computes it, from means that are found elsewhere.

    Args:
        sums: From the bias corrections ``(3, S)`` to the sums ``(3, S)``, over the coordinates that are here, of what
            the rule takes the means of: the squared parameter, ``a * g`` and ``b ** 2``.
    """
    means = _KnownMeans(torch.zeros(3, len(tensors.params), dtype=tensors.dtype, device=tensors.device))
    none = means.values.new_empty(0)
    state = {**dict.fromkeys(MOMENTS, none), "step": torch.stack([state["step"] for state in tensors.states])}
    corrections = rule.statistics(none, none, state, means)[0][:CORRECTIONS]
    totals = sums(corrections)
    if tensors.total is not None:
        totals = tensors.total(totals)
    means.values = totals / _counts(tuple(tensors.counts), tensors.dtype, tensors.device)
    return rule.statistics(none, none, state, means)


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
