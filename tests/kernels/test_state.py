"""How state is kept in fewer bits, and what that costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learnedopt.kernels import StateDtype, keep_state, read_state, state_layout
from learnedopt.kernels.core.state import CODES, FINE_CODES, decode, encode
from learnedopt.rules import (
    AdamLSTMConfig,
    AdamLSTMRule,
    CoordinateLSTM,
    LSTMRule,
    MetaLSTMRule,
    RNNpropRule,
    ScheduleFreeConfig,
    ScheduleFreeRule,
    UpdateRule,
)
from tests.optim.reference import TraceRule

vectors = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9)
each_width = pytest.mark.parametrize(
    ("fine", "largest"), [(False, CODES), (True, FINE_CODES)], ids=["eight bits", "ten bits"]
)


def bytes_per_parameter(rule: UpdateRule, state_dtype: StateDtype) -> int:
    layout = state_layout(rule, torch.float32, state_dtype)
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values() if spec.scope == "coordinate")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LSTMRule(), {"float32": 320, "bfloat16": 160, "int8": 98}),
        (AdamLSTMRule(), {"float32": 332, "bfloat16": 172, "int8": 110}),
        (AdamLSTMRule(AdamLSTMConfig(hidden_size=8)), {"float32": 140, "bfloat16": 76, "int8": 56}),
        (MetaLSTMRule(), {"float32": 168, "bfloat16": 88, "int8": 57}),
        (ScheduleFreeRule(ScheduleFreeConfig(CoordinateLSTM())), {"float32": 144, "bfloat16": 80, "int8": 60}),
        (ScheduleFreeRule(), {"float32": 16, "bfloat16": 16, "int8": 16}),
        (RNNpropRule(), {"float32": 328, "bfloat16": 168, "int8": 106}),
    ],
    ids=[
        "lstm",
        "adam-lstm",
        "adam-lstm of the zoo",
        "meta-lstm",
        "schedule-free",
        "schedule-free, no LSTM",
        "rnnprop",
    ],
)
def test_bytes_per_parameter(rule: UpdateRule, expected: dict[StateDtype, int]) -> None:
    assert {state_dtype: bytes_per_parameter(rule, state_dtype) for state_dtype in expected} == expected


def test_only_vectors_of_coordinates_are_kept_in_fewer_bits() -> None:
    layout = state_layout(TraceRule(), torch.float64, "int8")
    assert {name: (spec.shape, spec.scope, spec.dtype) for name, spec in layout.items()} == {
        "traces": ((2, 1), "coordinate", torch.int8),
        "traces_low": ((2, 1), "coordinate", torch.uint8),
        "traces_scale": ((2,), "coordinate", torch.bfloat16),
        "last": ((), "coordinate", torch.float64),
        "means": ((3,), "tensor", torch.float64),
        "steps": ((), "tensor", torch.float64),
    }


def test_what_an_lstm_makes_anew_has_eight_bits_and_what_it_adds_up_has_ten() -> None:
    for rule in (
        LSTMRule(),
        AdamLSTMRule(),
        MetaLSTMRule(),
        ScheduleFreeRule(ScheduleFreeConfig(CoordinateLSTM())),
        RNNpropRule(),
    ):
        layout = state_layout(rule, torch.float32, "int8")
        assert "c_low" in layout and "h_low" not in layout


def naive(values: list[float], largest: int) -> tuple[float, list[int]]:
    """The scale of one vector and its codes, by the formula."""
    scale = float(torch.tensor(max(map(abs, values))).bfloat16())
    roots = [math.sqrt(abs(value) * largest**2 / max(scale, 1e-30)) for value in values]
    return scale, [int(math.copysign(min(largest, round(root)), value)) for root, value in zip(roots, values)]


@each_width
@given(vectors)
def test_codes_are_those_of_the_formula(fine: bool, largest: int, values: list[float]) -> None:
    codes, low, scale = encode(torch.tensor(values, dtype=torch.float64).unsqueeze(1), fine)
    expected_scale, expected = naive(values, largest)
    assert (codes.dtype, scale.dtype, scale.tolist()) == (torch.int8, torch.bfloat16, [expected_scale])
    if low is None:
        assert codes.flatten().tolist() == expected
        return
    assert (low.dtype, low.shape) == (torch.uint8, (math.ceil(len(values) / 4), 1))
    assert codes.flatten().tolist() == [math.floor(code / 4) for code in expected]
    for index, byte in enumerate(low.flatten().tolist()):
        digits = [code % 4 for code in expected[4 * index : 4 * index + 4]]
        assert byte == sum(digit * 4**unit for unit, digit in enumerate(digits))


@each_width
@given(vectors)
def test_a_code_is_the_nearest_on_the_scale_of_square_roots(fine: bool, largest: int, values: list[float]) -> None:
    x = torch.tensor(values).unsqueeze(1)
    kept = encode(x, fine)
    scale = float(kept[2].float())
    assert scale == pytest.approx(max(abs(value) for value in values), rel=2**-8, abs=1e-38)
    if scale < 1e-30:
        return
    roots = [part.abs().div(scale).sqrt().copysign(part) * largest for part in (x, decode(*kept, torch.float32))]
    # Nothing is above the scale, which may have been rounded down.
    assert bool(((roots[0].clamp(-largest, largest) - roots[1]).abs() <= 0.51).all())


@each_width
@given(vectors)
def test_what_is_kept_again_and_again_stays_as_it_is(fine: bool, largest: int, values: list[float]) -> None:
    kept = encode(torch.tensor(values).unsqueeze(1), fine)
    # Where the scale was rounded, ten bits can tell: then it moves once more.
    for _ in range(2 if fine else 0):
        kept = encode(decode(*kept, torch.float32), fine)
    again = encode(decode(*kept, torch.float32), fine)
    if float(kept[2]) >= 1e-30:
        assert all(one is two or torch.equal(one, two) for one, two in zip(kept, again))  # type: ignore[arg-type]


@each_width
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_and_does_not_reach_its_neighbours(fine: bool, largest: int, bad: float) -> None:
    x = torch.tensor([[1.0, 0.5], [bad, 0.25]])
    kept = decode(*encode(x, fine), torch.float32)
    assert kept[:, 0].isnan().all() and kept[:, 1].isfinite().all()


@each_width
def test_zero_is_zero(fine: bool, largest: int) -> None:
    kept = encode(torch.zeros(3, 2), fine)
    assert not any(part.any() for part in kept if part is not None)
    assert not decode(*kept, torch.float32).any()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_state_is_read_as_it_was_kept(state_dtype: StateDtype) -> None:
    rule = AdamLSTMRule(AdamLSTMConfig(hidden_size=5))
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    values = {"h": draw(2, 5, 40).tanh(), "c": draw(2, 5, 40), "fast": draw(40), "slow": draw(40), "square": draw(40)}
    layout = state_layout(rule, torch.float32, state_dtype)
    kept = keep_state(values, layout)
    spec = {name: spec for name, spec in rule.state_spec().items() if spec.scope == "coordinate"}
    read = read_state(kept, spec, torch.float32)
    for name, value in values.items():
        # Half the distance of the codes at the largest unit, and the scale's rounding.
        in_codes = 1.0 / (FINE_CODES if name == "c" else CODES) + 2**-8
        tolerance = {"float32": 0.0, "bfloat16": 2**-8, "int8": in_codes}[state_dtype]
        limit = tolerance * value.abs().amax(-2) if value.dim() == 3 else 0.0
        assert bool(((read[name] - value).abs() <= (limit.unsqueeze(-2) if isinstance(limit, Tensor) else 0.0)).all())
