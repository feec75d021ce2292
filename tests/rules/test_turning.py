"""State where bases turn, and the averages behind the way: numbers, not only what follows from them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learnedopt.rules import (
    InEigenbases,
    InEigenbasesConfig,
    LawsConfig,
    LawsRule,
    ScheduleFreeConfig,
    ScheduleFreeRule,
    Segments,
)
from learnedopt.rules.coordinates import Turns
from learnedopt.rules.moments import momentum_bound


def turned_by(angle: float) -> Turns:
    """The rows of matrices of two, turned."""
    turns = Turns()
    cos, sin = math.cos(angle), math.sin(angle)
    turns.add("left", torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64), torch.tensor([0, 1]))
    return turns


@pytest.mark.parametrize(("times", "cut"), [(1.0, True), (0.5, False)])
def test_a_momentum_is_cut_to_what_the_second_moment_allows_where_it_turns_to(times: float, cut: bool) -> None:
    """At most, it is in each of two coordinates what their second moments allow. Turned by half a right angle, it is
    root two of that in one, which has no more of the second moment than before."""
    frame = ScheduleFreeConfig(square_decay=0.99)
    bound = momentum_bound(frame.momentum_decay, frame.square_decay)
    rule = InEigenbases(InEigenbasesConfig(frame))
    state = {
        "momentum": torch.full((2, 3), times * bound, dtype=torch.float64),
        "square": torch.ones(2, 3, dtype=torch.float64),
        "offset": torch.full((2, 3), 100.0, dtype=torch.float64),
    }
    after = rule.coordinates.carry(state, turned_by(math.pi / 4))
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[0] = bound if cut else times * bound * math.sqrt(2.0)
    torch.testing.assert_close(after["momentum"], expected)
    torch.testing.assert_close(after["square"], torch.ones(2, 3, dtype=torch.float64))
    # What has no bound turns whole.
    torch.testing.assert_close(after["offset"][0], torch.full((3,), 100.0 * math.sqrt(2.0), dtype=torch.float64))


@pytest.mark.parametrize(
    "rule", [LawsRule(LawsConfig(way_decay=0.9)), ScheduleFreeRule(ScheduleFreeConfig(way_decay=0.9))]
)
def test_the_averages_behind_the_way_are_averages(rule: LawsRule | ScheduleFreeRule) -> None:
    """That they are right up to a factor would not show in their correlation."""
    rule, segments = rule.double(), Segments([2])
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    state = rule.init_state(segments, torch.float64, param=start)
    slopes: list[Tensor] = [
        torch.tensor(values, dtype=torch.float64) for values in ([3.0, 1.0], [-2.0, 4.0], [1.0, 1.0])
    ]
    ways: list[Tensor] = [torch.tensor(values, dtype=torch.float64) for values in ([0.0, 0.0], [0.5, -1.0], [2.0, 1.0])]
    expected = dict.fromkeys(("slope", "steepness", "distance"), 0.0)
    for slope, way in zip(slopes, ways):
        with torch.no_grad():
            _, after = rule.statistics(start - way, slope, state, segments)
        state = {**state, **after}
        means = {"slope": slope * way, "steepness": slope**2, "distance": way**2}
        for name, values in means.items():
            expected[name] = 0.9 * expected[name] + 0.1 * float(values.mean())
            assert float(state[name]) == pytest.approx(expected[name])
