"""The average that a rule keeps, in the place of the parameters for as long as they are judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from learnedopt.optim.options import Group
from learnedopt.optim.registry import RuleRegistry
from learnedopt.optim.sharding import is_distributed, keep_whole, local, whole
from learnedopt.optim.state import as_real, has_coordinates
from learnedopt.rules import UpdateRule


@contextmanager
def averaged(groups: Iterable[Group], states: dict[Any, Any], rules: RuleRegistry) -> Iterator[None]:
    """Parameters are the average within, and bit for bit what they were after, whatever happens within."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for group in groups:
                if group["mask_zero_gradients"]:
                    continue  # the average of what is masked is not where it is held
                for param in dict.fromkeys(group["params"]):
                    if state := states.get(param):
                        value = as_real(param)
                        dtype = rules.dtype(group["rule_sha256"], value.dtype)
                        rule = rules.placed(group["rule_sha256"], value.device, dtype)
                        kept.append((local(value), local(value).clone()))
                        _average(value, state, rule, dtype)
        yield
    finally:
        with torch.no_grad():
            for value, before in kept:
                value.copy_(before)


def _average(value: Tensor, state: dict[str, Tensor], rule: UpdateRule, dtype: torch.dtype) -> None:
    if is_distributed(value) and has_coordinates(rule, value):  # every process has all of its state
        keep_whole(value, rule.average(whole(value).to(dtype), state))
    else:
        here = local(value)
        here.copy_(rule.average(here.to(dtype), {name: local(entry) for name, entry in state.items()}))
