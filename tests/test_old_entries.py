"""Entries that an earlier version wrote load, and compute what they did; ``fixtures/zoo/README.md`` tells more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learnedopt.fewshot import Learner, learner_info, load_learner
from learnedopt.rules import Segments, UpdateRule
from learnedopt.zoo import former_fingerprint, load_rule, rule_fingerprint

WITHOUT_UNITS = {"eigenbasis-power-laws", "schedule-free-power-laws"}
ENTRIES = Path(__file__).parent / "fixtures" / "zoo"
RECORDED = json.loads((ENTRIES / "recorded.json").read_text())
SHAPES = [(3, 4), (5,), (2, 1, 3, 3)]


def fingerprint(rule: UpdateRule) -> str:
    """The fingerprint that the rule had in the version that wrote the entries."""
    return former_fingerprint(rule) or rule_fingerprint(rule)


def three_steps(rule: UpdateRule) -> Tensor:
    """The updates ``(3, N)`` of parameters and gradients that are formulas."""
    rule = rule.double()
    segments = Segments([math.prod(shape) for shape in SHAPES], shapes=SHAPES)
    places = torch.arange(segments.num_coordinates, dtype=torch.float64)
    param, found = torch.cos(places), []
    state = rule.init_state(segments, torch.float64, param=param)
    for step in range(3):
        grad = (1.0 + step) * torch.sin(places.square() + step)
        delta, state = rule.update(param, grad, state, segments, torch.tensor(2.0 - 0.5 * step, dtype=torch.float64))
        found.append(delta)
        param = param + delta
    return torch.stack(found)


def predictions(learner: Learner) -> Tensor:
    """Logits ``(6, 3)`` of queries that are a formula, after a fit to six examples."""
    count = 12 * math.prod(learner.shape.example_shape)
    x = torch.sin(1.7 * torch.arange(count, dtype=torch.float64)).view(12, *learner.shape.example_shape)
    return learner.double().fit(x[:6], torch.tensor([0, 0, 1, 1, 2, 2])).predict(x[6:])


def test_every_entry_has_its_record() -> None:
    rules = {file.parent.name for file in ENTRIES.glob("*/config.json")}
    learners = {file.parent.name for file in ENTRIES.glob("fewshot/*/config.json")}
    assert rules == RECORDED["rules"].keys() and learners == RECORDED["learners"].keys()
    assert len(rules) == 9 and len(learners) == 2


# Without an LSTM there was a setting for its units, 4 in these, which meant nothing and is not kept.
@pytest.mark.parametrize("name", sorted(RECORDED["rules"].keys() - WITHOUT_UNITS))
def test_a_rule_is_the_one_that_was_saved(name: str) -> None:
    assert fingerprint(load_rule(ENTRIES / name)) == RECORDED["rules"][name]["fingerprint"]


@pytest.mark.parametrize("name", sorted(RECORDED["rules"]))
def test_a_rule_takes_the_steps_that_it_took(name: str) -> None:
    expected = torch.tensor(RECORDED["rules"][name]["updates"], dtype=torch.float64)
    torch.testing.assert_close(three_steps(load_rule(ENTRIES / name)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(RECORDED["learners"]))
def test_a_learner_predicts_what_it_did(name: str) -> None:
    entry = ENTRIES / "fewshot" / name
    found = predictions(load_learner(entry, learner_info(entry).learner.normalization))
    expected = torch.tensor(RECORDED["learners"][name]["predictions"], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-9)
