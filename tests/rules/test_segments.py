from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnedopt.rules import Segments
from tests.rules.support import property_test, random_values

layouts = st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 3))


def owners(sizes: list[int], copies: int) -> list[int]:
    """The segment each coordinate belongs to."""
    return [s for s, size in enumerate(sizes * copies) for _ in range(size)]


@property_test
@given(layout=layouts)
def test_sum_mean_and_expand(layout: tuple[list[int], int]) -> None:
    sizes, copies = layout
    segments, owner = Segments(sizes, copies), owners(sizes, copies)
    assert (segments.num_coordinates, segments.num_segments) == (len(owner), copies * len(sizes))
    x = random_values((2, len(owner)), 1)
    sums = torch.zeros(2, segments.num_segments, dtype=x.dtype)
    for n, s in enumerate(owner):
        sums[:, s] += x[:, n]
    torch.testing.assert_close(segments.sum(x), sums)
    counts = torch.tensor([max(size, 1) for size in sizes * copies])
    torch.testing.assert_close(segments.mean(x), sums / counts)
    y = random_values((2, segments.num_segments), 3)
    assert torch.equal(segments.expand(y), y[:, owner])


def test_no_statistics_expand_to_no_statistics() -> None:
    assert Segments([2, 3], copies=2).expand(torch.empty(0, 4)).shape == (0, 10)


@pytest.mark.parametrize(("sizes", "copies"), [([-1], 1), ([2, -3], 1), ([2], 0)])
def test_impossible_layouts_are_refused(sizes: list[int], copies: int) -> None:
    with pytest.raises(ValueError, match="copies must be at least 1 and no size negative"):
        Segments(sizes, copies)
