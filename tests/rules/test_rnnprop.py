from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnedopt.rules import RNNpropConfig, RNNpropRule, Segments
from tests.rules.support import property_test, random_rule, random_values, run


def test_it_has_the_weights_of_the_paper() -> None:
    # H(2 + 1) + 2 * 4H(2H + 1) + H + 1 at H = 20.
    assert sum(weight.numel() for weight in RNNpropRule().parameters()) == 6641


def test_untrained_it_does_not_move() -> None:
    with torch.no_grad():
        deltas, _ = run(RNNpropRule().double(), Segments([3]), random_values((4, 3), 0), random_values((4, 3), 2))
    assert (deltas == 0.0).all()


@property_test
@given(exponent=st.integers(-8, 8), seed=st.integers(0, 100))
def test_multiplying_the_loss_changes_nothing(exponent: int, seed: int) -> None:
    rule, segments = random_rule({"kind": "rnnprop", "eps": 1e-18}, seed=seed), Segments([4, 2])
    params = random_values((10, 6), seed)
    grads = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
        scaled, _ = run(rule, segments, params, 10.0**exponent * grads)
    torch.testing.assert_close(scaled, deltas, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30, math.inf])
def test_no_update_exceeds_the_bound(size: float) -> None:
    rule, segments = random_rule({"kind": "rnnprop", "output_scale": 0.02}, torch.float32, scale=3.0), Segments([5])
    assert isinstance(rule, RNNpropRule)
    grads = size * random_values((20, 5), 3, torch.float32).sign()
    grads = grads.nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
    with torch.no_grad():
        deltas, state = run(rule, segments, torch.zeros(20, 5), grads)
    assert deltas.abs().max() <= rule.update_bound() * (1.0 + 1e-6)
    assert all(value.isfinite().all() for value in state.values())


def test_the_momentum_is_seen() -> None:
    rule, segments = random_rule("rnnprop"), Segments([1])
    steady, swinging = torch.ones(6, 1, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    swinging[:-1:2] = -1.0
    with torch.no_grad():
        one, _ = run(rule, segments, torch.zeros_like(steady), steady)
        other, _ = run(rule, segments, torch.zeros_like(steady), swinging)
    assert not torch.isclose(one[-1], other[-1], rtol=1e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"momentum_decay": 1.0}, r"momentum_decay must be in \[0, 1\), got 1.0"),
        ({"square_decay": -0.1}, r"square_decay must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "eps must be finite and at least 1e-18, got 0.0"),
        ({"output_scale": 0.0}, "output_scale must be positive and finite, got 0.0"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float], message: str) -> None:
    config = dataclasses.replace(RNNpropConfig(), **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        RNNpropRule(config)
