"""What the form of the Adam-LSTM promises, whatever its weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnedopt.rules import AdamLSTMConfig, AdamLSTMRule, Segments
from tests.rules.support import property_test, random_rule, random_values, run


@property_test
@given(exponent=st.integers(-8, 8), seed=st.integers(0, 100))
def test_multiplying_the_loss_changes_nothing(exponent: int, seed: int) -> None:
    rule, segments = random_rule({"kind": "adam_lstm", "eps": 1e-18}, seed=seed), Segments([4, 2])
    params = random_values((10, 6), seed)
    grads = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
        scaled, _ = run(rule, segments, params, 10.0**exponent * grads)
    torch.testing.assert_close(scaled, deltas, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        AdamLSTMConfig(),
        AdamLSTMConfig(nominal_step=0.1, fast_decay=0.5, square_decay=0.999, eps=1e-8),
        AdamLSTMConfig(fast_decay=0.0, eps=1e-3),
    ],
)
def test_untrained_it_is_adam(config: AdamLSTMConfig) -> None:
    rule, segments = AdamLSTMRule(config).double(), Segments([3, 4])
    start = random_values((7,), 1)
    target = random_values((7,), 3)
    theirs = start.clone().requires_grad_()
    betas = (config.fast_decay, config.square_decay)
    adam = torch.optim.Adam([theirs], lr=config.nominal_step, betas=betas, eps=config.eps)
    ours, state = start.clone(), rule.init_state(segments, dtype=torch.float64)
    for _ in range(50):
        adam.zero_grad()
        (theirs - target).pow(4).sum().backward()
        adam.step()
        with torch.no_grad():
            delta, state = rule.update(ours, 4 * (ours - target) ** 3, state, segments)
            ours = ours + delta
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-12)


magnitudes = st.sampled_from([0.0, 1e-42, 1e-25, 1e-12, 1e-6, 1.0, 1e6, 1e15, 1e30])
signed = st.builds(lambda size, sign: size * sign, magnitudes, st.sampled_from([1.0, -1.0]))


@property_test
@given(
    rows=st.lists(st.lists(signed, min_size=3, max_size=3), min_size=1, max_size=30),
    seed=st.integers(0, 100),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
)
def test_updates_stay_within_the_bound(rows: list[list[float]], seed: int, scale: float) -> None:
    rule, segments = random_rule("adam_lstm", torch.float32, seed, scale), Segments([2, 1])
    grads = torch.tensor(rows)
    with torch.no_grad():
        deltas, _ = run(rule, segments, torch.ones_like(grads), grads)
    assert isinstance(rule, AdamLSTMRule)
    assert (deltas.abs() <= rule.update_bound() * (1 + 1e-5)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_spike_after_silence_stays_within_the_bound(sign: float) -> None:
    rule, segments = AdamLSTMRule(), Segments([1])
    torch.nn.init.constant_(rule.readout.bias, 1e3)
    grads = torch.zeros(1000, 1)
    grads[500] = sign
    with torch.no_grad():
        deltas, _ = run(rule, segments, torch.zeros_like(grads), grads)
    assert 0.1 * rule.update_bound() < deltas.abs().max() <= rule.update_bound()


@pytest.mark.parametrize(("decay", "square_decay"), [(0.9, 0.99), (0.9, 0.995), (0.5, 0.95)])
def test_no_smaller_bound_would_do(decay: float, square_decay: float) -> None:
    # With next to nothing left to learn, the bound is that of Adam's own direction, and this is the worst sequence.
    config = AdamLSTMConfig(
        fast_decay=decay, slow_decay=decay, square_decay=square_decay, mix_bound=1e-9, log_step_bound=1e-9, eps=1e-18
    )
    rule, steps = AdamLSTMRule(config).double(), 3000
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    grads = ((decay / square_decay) ** ages).unsqueeze(1)
    with torch.no_grad():
        deltas, _ = run(rule, Segments([1]), torch.zeros_like(grads), grads)
    assert deltas[-1].abs().item() == pytest.approx(rule.update_bound(), rel=1e-2)


@pytest.mark.parametrize(("decay", "square_decay"), [(0.9, 0.0), (0.99, 0.9), (0.0, 0.0)])
def test_without_a_long_second_moment_there_is_no_bound(decay: float, square_decay: float) -> None:
    config = AdamLSTMConfig(fast_decay=decay, slow_decay=decay, square_decay=square_decay)
    assert AdamLSTMRule(config).update_bound() == math.inf


def test_steps_beyond_the_last_trained_for_look_alike() -> None:
    rule, segments = random_rule({"kind": "adam_lstm", "max_time": 1000.0}, torch.float32), Segments([3])
    param, grad = torch.ones(3), torch.tensor([0.5, -2.0, 1e-3])
    state = rule.init_state(segments)
    state["slow"], state["square"] = grad.clone(), grad.square()
    seen = []
    # The last two are beyond the whole numbers that float32 can tell apart.
    for step in (999.0, 1e5, 1e7, 1e9, 1e30):
        with torch.no_grad():
            delta, _ = rule.update(param, grad, {**state, "step": torch.tensor([step])}, segments)
        assert delta.isfinite().all()
        seen.append(delta)
    for delta in seen[1:]:
        torch.testing.assert_close(delta, seen[0], rtol=1e-3, atol=0.0)
        assert torch.equal(delta, seen[-1])


@pytest.mark.parametrize(
    "setting",
    [
        {"fast_decay": 1.0},
        {"slow_decay": -0.1},
        {"square_decay": math.nan},
        {"eps": 0.0},
        {"eps": 1e-60},
        {"nominal_step": math.inf},
        {"nominal_step": -1.0},
        {"log_step_gain": 0.0},
        {"log_step_bound": math.nan},
        {"mix_bound": 0.0},
        {"max_time": 1.0},
        {"hidden_size": 0},
        {"num_layers": 1.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    config = dataclasses.replace(AdamLSTMConfig(), **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(setting))):
        AdamLSTMRule(config)
