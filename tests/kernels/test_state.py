"""How state is kept in fewer bits, and what that costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learnedopt.kernels import StateDtype, keep_state, read_state, state_layout
from learnedopt.kernels.state import CODES, decode, encode
from learnedopt.rules import AdamLSTMConfig, AdamLSTMRule, LSTMRule, MetaLSTMRule, UpdateRule
from tests.optim.reference import TraceRule

vectors = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6)


def bytes_per_parameter(rule: UpdateRule, state_dtype: StateDtype) -> int:
    layout = state_layout(rule, torch.float32, state_dtype)
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values() if spec.scope == "coordinate")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LSTMRule(), {"float32": 320, "bfloat16": 160, "int8": 88}),
        (AdamLSTMRule(), {"float32": 332, "bfloat16": 172, "int8": 100}),
        (AdamLSTMRule(AdamLSTMConfig(hidden_size=8)), {"float32": 140, "bfloat16": 76, "int8": 52}),
        (MetaLSTMRule(), {"float32": 168, "bfloat16": 88, "int8": 52}),
    ],
    ids=["lstm", "adam-lstm", "adam-lstm of the zoo", "meta-lstm"],
)
def test_bytes_per_parameter(rule: UpdateRule, expected: dict[StateDtype, int]) -> None:
    assert {state_dtype: bytes_per_parameter(rule, state_dtype) for state_dtype in expected} == expected


def test_only_vectors_of_coordinates_are_kept_in_fewer_bits() -> None:
    layout = state_layout(TraceRule(), torch.float64, "int8")
    assert {name: (spec.shape, spec.scope, spec.dtype) for name, spec in layout.items()} == {
        "traces": ((2, 1), "coordinate", torch.int8),
        "traces_scale": ((2,), "coordinate", torch.bfloat16),
        "last": ((), "coordinate", torch.float64),
        "means": ((3,), "tensor", torch.float64),
        "steps": ((), "tensor", torch.float64),
    }


@given(vectors)
def test_a_code_is_the_nearest_on_the_scale_of_square_roots(values: list[float]) -> None:
    x = torch.tensor(values).unsqueeze(1)
    codes, scale = encode(x, 0)
    assert codes.dtype == torch.int8 and scale.dtype == torch.bfloat16 and scale.shape == (1,)
    kept = decode(codes, scale, torch.float32)
    largest = float(scale.float())
    assert largest == pytest.approx(max(abs(value) for value in values), rel=2**-8, abs=1e-38)
    if largest < 1e-30:
        return
    roots = [part.abs().div(largest).sqrt().copysign(part) * CODES for part in (x, kept)]
    assert bool(((roots[0] - roots[1]).abs() <= 0.51).all())


@given(vectors)
def test_what_was_kept_once_is_kept_as_it_is(values: list[float]) -> None:
    kept = encode(torch.tensor(values).unsqueeze(1), 0)
    again = encode(decode(*kept, torch.float32), 0)
    if float(kept[1]) >= 1e-30:
        assert all(torch.equal(one, two) for one, two in zip(kept, again))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_and_does_not_reach_its_neighbours(bad: float) -> None:
    x = torch.tensor([[1.0, 0.5], [bad, 0.25]])
    kept = decode(*encode(x, 0), torch.float32)
    assert kept[1, 0].isnan() and kept[:, 1].isfinite().all()


def test_zero_is_zero() -> None:
    codes, scale = encode(torch.zeros(3, 2), 0)
    assert not codes.any() and not scale.any()
    assert not decode(codes, scale, torch.float32).any()


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
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "int8": 2.2e-2}[state_dtype]
    for name, value in values.items():
        limit = tolerance * value.abs().amax(-2) if value.dim() == 3 else 0.0
        assert bool(((read[name] - value).abs() <= (limit.unsqueeze(-2) if isinstance(limit, Tensor) else 0.0)).all())
