"""What the form of the Schedule-Free rule promises, whatever its modulator and its weights."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learnedopt.rules import (
    CoordinateLSTM,
    Modulator,
    ModulatorConfig,
    ScheduleFreeConfig,
    ScheduleFreeRule,
    Segments,
    State,
    TensorController,
)
from tests.rules.support import property_test, random_rule, random_values, run

KIND = "schedule_free"
WAY, TOGETHER, SMALLNESS, BEGINNING = -4, -3, -2, -1  # rows of the statistics


@property_test
@given(exponent=st.integers(-8, 8), seed=st.integers(0, 100))
def test_multiplying_the_loss_changes_nothing(exponent: int, seed: int) -> None:
    rule, segments = random_rule({"kind": KIND, "eps": 1e-18}, seed=seed), Segments([4, 2])
    params = random_values((10, 6), seed)
    grads = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
        scaled, _ = run(rule, segments, params, 10.0**exponent * grads)
    torch.testing.assert_close(scaled, deltas, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lr", [1.0, 0.25])
@pytest.mark.parametrize(
    "config",
    [
        ScheduleFreeConfig(),
        ScheduleFreeConfig(nominal_step=0.1, averaging_power=0.0, square_decay=0.99, eps=1e-8),
        ScheduleFreeConfig(interpolation=0.0),
    ],
    ids=["default", "uniform average", "no interpolation"],
)
def test_untrained_it_is_schedule_free_adam(config: ScheduleFreeConfig, lr: float) -> None:
    """At every ``lr``, which stands for a step size of ``lr * nominal_step``."""
    rule, segments = ScheduleFreeRule(config).double(), Segments([3, 4])
    ours = random_values((7,), 1)
    target = random_values((7,), 3)
    y, z, x, square = ours.clone(), ours.clone(), ours.clone(), torch.zeros(7, dtype=torch.float64)
    state = rule.init_state(segments, dtype=torch.float64, param=ours)
    for step in range(1, 51):
        gradient = 4 * (y - target) ** 3
        square = config.square_decay * square + (1 - config.square_decay) * gradient**2
        denominator = (square / (1 - config.square_decay**step)).sqrt() + config.eps
        z = z - lr * config.nominal_step * gradient / denominator
        weight = (config.averaging_power + 1) / (step + config.averaging_power)
        x = (1 - weight) * x + weight * z
        y = config.interpolation * x + (1 - config.interpolation) * z
        with torch.no_grad():
            delta, state = rule.update(ours, 4 * (ours - target) ** 3, state, segments)
            ours = ours + lr * delta
        torch.testing.assert_close(ours, y, rtol=1e-9, atol=1e-12)


magnitudes = st.sampled_from([0.0, 1e-42, 1e-25, 1e-12, 1e-6, 1.0, 1e6, 1e15, 1e30])
signed = st.builds(lambda size, sign: size * sign, magnitudes, st.sampled_from([1.0, -1.0]))


@property_test
@given(
    rows=st.lists(st.lists(signed, min_size=3, max_size=3), min_size=1, max_size=30),
    seed=st.integers(0, 100),
    scale=st.sampled_from([1.0, 30.0, 1e4]),
)
def test_updates_stay_within_the_bound(rows: list[list[float]], seed: int, scale: float) -> None:
    rule, segments = random_rule(KIND, torch.float32, seed, scale), Segments([2, 1])
    grads = torch.tensor(rows)
    with torch.no_grad():
        deltas, _ = run(rule, segments, torch.ones_like(grads), grads)
    assert isinstance(rule, ScheduleFreeRule)
    assert (deltas.abs() <= rule.update_bound() * (1 + 1e-5)).all()


def test_an_average_let_go_at_once_stays_within_the_bound() -> None:
    """The worst that averaging can do: it forgets nothing for long, and then all at once."""
    config = ScheduleFreeConfig(square_decay=0.9, momentum_decay=0.0)
    rule = ScheduleFreeRule(config)
    torch.nn.init.constant_(rule.modulator.readout.bias[:3], 1e3)
    segments, steps = Segments([1]), 400
    state, largest = rule.init_state(segments, param=torch.zeros(1)), 0.0
    grads = torch.full((steps, 1), -1.0)
    with torch.no_grad():
        for step, grad in enumerate(grads):
            rule.modulator.readout.bias[3] = 1e3 if step == steps - 1 else -1e3
            delta, state = rule.update(torch.zeros(1), grad, state, segments)
            largest = max(largest, float(delta.abs()))
    assert 0.05 * rule.update_bound() < largest <= rule.update_bound()


def test_without_a_long_second_moment_there_is_no_bound() -> None:
    assert ScheduleFreeRule(ScheduleFreeConfig(square_decay=0.5)).update_bound() == math.inf


def test_the_way_tells_steps_that_led_on_from_steps_that_led_too_far() -> None:
    rule, segments = ScheduleFreeRule().double(), Segments([5, 5])
    state = rule.init_state(segments, dtype=torch.float64, param=torch.ones(10))
    # Both started at 1 on a slope down to 0. The first tensor is on its way, the second has come out on the other side.
    ways = []
    for first, second in ((1.0, 1.0), (0.8, -1.0), (0.6, -1.5)):
        param = torch.tensor([first] * 5 + [second] * 5, dtype=torch.float64)
        with torch.no_grad():
            statistics, tensor_state = rule.statistics(param, param, state, segments)
            _, coordinate_state = rule(param, param, state, segments.expand(statistics))
        state = {**state, **tensor_state, **coordinate_state}
        ways.append(statistics[WAY].tolist())
    assert ways[0] == [0.0, 0.0]
    assert all(on > 0.9 and beyond < -0.9 for on, beyond in ways[1:])


def test_tensors_that_began_small_go_on_being_told_apart() -> None:
    rule, segments = ScheduleFreeRule().double(), Segments([2, 2, 2])
    state, seen = rule.init_state(segments, dtype=torch.float64, param=torch.zeros(6)), []
    for scale in (1.0, 1e3, 0.0):
        # A usual one, one of a tenth of that, and one that begins at zero, as biases do.
        param = scale * torch.tensor([0.5, -0.5, 0.01, 0.01, 0.0, 0.0], dtype=torch.float64)
        with torch.no_grad():
            statistics, tensor_state = rule.statistics(param, torch.ones_like(param), state, segments)
            _, coordinate_state = rule(param, torch.ones_like(param), state, segments.expand(statistics))
        state = {**state, **tensor_state, **coordinate_state}
        seen.append(statistics)
    for step, statistics in enumerate(seen):
        assert statistics[SMALLNESS].tolist() == pytest.approx([0.0, -math.log(10.0) / 3, 0.0])
        assert statistics[TOGETHER].tolist() == pytest.approx([math.log(3.0) / 3] * 3)
        assert statistics[BEGINNING].tolist() == pytest.approx([math.exp(-step / 10)] * 3)


@property_test
@given(exponent=st.integers(-45, 38), seed=st.integers(0, 100))
def test_the_way_is_within_one_for_gradients_of_every_size(exponent: int, seed: int) -> None:
    rule, segments = ScheduleFreeRule(), Segments([4, 1])
    state = rule.init_state(segments, param=random_values((5,), seed).float())
    for param, grad in zip(random_values((6, 5), seed).float(), random_values((6, 5), seed + 1)):
        grad = (grad * 10.0**exponent).clamp(-3e38, 3e38).float()
        with torch.no_grad():
            statistics, tensor_state = rule.statistics(param, grad, state, segments)
            _, coordinate_state = rule(param, grad, state, segments.expand(statistics))
        state = {**state, **tensor_state, **coordinate_state}
        assert (statistics[WAY].abs() <= 1.0).all()
        assert all(value.isfinite().all() for value in state.values())


def test_steps_far_beyond_training_are_served() -> None:
    rule, segments = random_rule({"kind": KIND, "max_time": 1000.0}, torch.float32), Segments([3])
    param, grad = torch.ones(3), torch.tensor([0.5, -2.0, 1e-3])
    state = rule.init_state(segments, param=param)
    state["momentum"], state["square"] = grad.clone(), grad.square()
    for step in (999.0, 1e5, 1e7, 1e9, 1e30):
        with torch.no_grad():
            delta, after = rule.update(param, grad, {**state, "step": torch.tensor([step])}, segments)
        assert delta.isfinite().all() and all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    "setting",
    [
        {"momentum_decay": 1.0},
        {"square_decay": math.nan},
        {"interpolation": -0.1},
        {"way_decay": 1.0},
        {"way_gain": 0.0},
        {"usual_scale": 0.0},
        {"warmup": -1.0},
        {"eps": 0.0},
        {"eps": 1e-60},
        {"nominal_step": math.inf},
        {"averaging_power": -1.0},
        {"log_step_gain": 0.0},
        {"log_step_bound": math.nan},
        {"log_averaging_bound": 0.0},
        {"mix_bound": 0.0},
        {"max_time": 1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    config = dataclasses.replace(ScheduleFreeConfig(), **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(setting))):
        ScheduleFreeRule(config)


@pytest.mark.parametrize("modulator", [CoordinateLSTM(hidden_size=0), TensorController(units=0)], ids=str)
def test_modulators_without_units_are_refused(modulator: CoordinateLSTM | TensorController) -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        ScheduleFreeRule(ScheduleFreeConfig(modulator=modulator))


def test_a_controller_begins_as_what_it_corrects() -> None:
    plain, segments = random_rule(KIND), Segments([3, 2])
    controlled = ScheduleFreeRule(ScheduleFreeConfig(modulator=TensorController())).double()
    weights = {name: weight for name, weight in plain.named_parameters() if "readout" in name}
    controlled.load_state_dict(weights, strict=False)
    params, grads = random_values((8, 5), 0), random_values((8, 5), 1)
    with torch.no_grad():
        torch.testing.assert_close(
            run(controlled, segments, params, grads)[0], run(plain, segments, params, grads)[0], rtol=0, atol=0
        )
        controlled.get_parameter("modulator.correction.weight").fill_(1.0)
        moved = run(controlled, segments, params, grads)[0]
    assert not torch.allclose(moved, run(plain, segments, params, grads)[0])


def test_a_modulator_of_ones_own_chooses_the_steps() -> None:
    class Constant(Modulator):
        def forward(self, seen: Tensor, state: State) -> tuple[Tensor, State]:
            return torch.zeros(4, seen.shape[1], dtype=seen.dtype).index_fill(0, torch.tensor(0), 1.0), {}

    @dataclasses.dataclass(frozen=True)
    class ConstantConfig(ModulatorConfig):
        kind: ClassVar[str] = "constant_modulator"

        def build(self, own: int, shared: int, outputs: int) -> Modulator:
            return Constant()

    config = ScheduleFreeConfig(modulator=ConstantConfig(), nominal_step=0.1)  # type: ignore[arg-type]
    rule, segments, param = ScheduleFreeRule(config), Segments([2]), torch.ones(2)
    delta, _ = rule.update(param, torch.tensor([2.0, -1.0]), rule.init_state(segments, param=param), segments)
    step = 0.1 * math.exp(5.0 * math.tanh(3.0 / 5.0))
    torch.testing.assert_close(delta, torch.tensor([-step, step]))
    assert ScheduleFreeConfig.from_dict(config.to_dict()) == config
