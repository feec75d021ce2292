from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from learnedopt.rules import LSTMConfig, LSTMRule, Segments
from tests.rules.support import random_rule, random_values, run


def test_it_has_the_weights_of_the_paper() -> None:
    # 4H(d + H + 1) + 4H(2H + 1) + H + 1 at H = 20 and the two channels of the preprocessing.
    assert sum(weight.numel() for weight in LSTMRule().parameters()) == 5141
    assert sum(weight.numel() for weight in LSTMRule(LSTMConfig(preprocessing="identity")).parameters()) == 5061


def test_untrained_it_does_not_move() -> None:
    with torch.no_grad():
        deltas, _ = run(LSTMRule().double(), Segments([3]), random_values((4, 3), 0), random_values((4, 3), 2))
    assert (deltas == 0.0).all()


def test_output_scale_multiplies_the_updates() -> None:
    segments, params, grads = Segments([3]), random_values((4, 3), 0), random_values((4, 3), 2)
    with torch.no_grad():
        one, _ = run(random_rule({"kind": "lstm", "output_scale": 1.0}), segments, params, grads)
        tenth, _ = run(random_rule({"kind": "lstm", "output_scale": 0.1}), segments, params, grads)
    torch.testing.assert_close(tenth, 0.1 * one)


def test_parameters_are_not_read() -> None:
    segments, params, grads = Segments([3]), random_values((4, 3), 0), random_values((4, 3), 2)
    with torch.no_grad():
        there, _ = run(random_rule("lstm"), segments, params, grads)
        elsewhere, _ = run(random_rule("lstm"), segments, params + 1.0, grads)
    assert torch.equal(there, elsewhere)


def test_fresh_weights_are_within_their_ranges() -> None:
    rule = LSTMRule()
    bound = 20**-0.5
    for weight in (*rule.lstm.input_weights, *rule.lstm.recurrent_weights):
        assert 0.5 * bound < weight.abs().max() <= bound
    for bias in rule.lstm.biases:
        i, f, g, o = bias.chunk(4)
        assert (f == 1.0).all()
        assert (torch.cat([i, g, o]) == 0.0).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"preprocessing": "log"},
        {"preprocessing_p": 0.0},
        {"preprocessing_p": math.nan},
        {"output_scale": math.inf},
        {"hidden_size": 0},
        {"hidden_size": 2.5},
        {"num_layers": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        LSTMRule(dataclasses.replace(LSTMConfig(), **setting))
