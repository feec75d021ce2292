"""State that version 0.1 saved goes on here as it went on there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt import LearnedOptimizer, list_entries
from learnedopt.zoo import ALIASES, entry_info

SAVED: dict[str, Any] = torch.load(Path(__file__).parents[1] / "fixtures" / "optim" / "states.pt")

THEN = {"default": "sf-eigen-1", "light": "sf-adam-1"}
"""The entries that had these roles."""


def build(name: str, params: list[torch.Tensor]) -> LearnedOptimizer:
    return LearnedOptimizer(params, THEN.get(name, name), lr=0.5, backend="reference")


@pytest.mark.parametrize("name", SAVED)
def test_a_run_goes_on_from_an_old_state(name: str) -> None:
    half = SAVED[name]["half"]
    params = [param.clone().requires_grad_() for param in half["params"]]
    optimizer = build(name, params)
    optimizer.load_state_dict(copy.deepcopy(half["optimizer"]))
    assert optimizer.param_groups[0]["rule"] == THEN.get(name, name)
    generator = torch.Generator()
    generator.set_state(half["generator"])
    for _ in range(6):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    # In bases, rounding errors are other ones than then: the origin and the parameters stay outside.
    tolerance = 1e-3 if name == "default" else 1e-6
    for param, end, start in zip(params, SAVED[name]["end"], half["params"], strict=True):
        assert (param - end).abs().max() <= tolerance * (end - start).abs().max()


@pytest.mark.parametrize("rule", ["light", "sf-eigen-2"])
def test_an_old_state_of_another_rule_is_refused(rule: str) -> None:
    """And it is said which entry it belongs to: roles have moved on."""
    half = SAVED["default"]["half"]
    optimizer = build(rule, [param.clone().requires_grad_() for param in half["params"]])
    with pytest.raises(ValueError, match=r"made with rule 'default' .* runs 'sf-.*rule='sf-eigen-1'"):
        optimizer.load_state_dict(half["optimizer"])


def test_what_is_saved_names_the_entry_and_not_its_role() -> None:
    param = torch.ones(2, requires_grad=True)
    for role, entry in ALIASES.items():
        assert entry in list_entries() and role not in list_entries()
        group = LearnedOptimizer([param], rule=role).state_dict()["param_groups"][0]
        assert group["rule"] == entry
        assert group["rule_sha256"] == LearnedOptimizer([param], rule=entry).param_groups[0]["rule_sha256"]
        assert entry_info(role).name == entry
