"""What is worked on together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnedopt.kernels.core.blocks import bundles


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([50, 50], [[0, 1]]), ([51, 20, 20], [[0], [1, 2]]), ([40, 40, 40], [[0, 1], [2]]), ([], [])],
)
def test_what_is_more_than_half_of_the_limit_is_alone(sizes: list[int], expected: list[list[int]]) -> None:
    assert list(bundles(sizes, 100)) == expected


@given(sizes=st.lists(st.integers(0, 200)))
def test_each_is_in_one_bundle_and_bundles_keep_to_the_limit(sizes: list[int]) -> None:
    found = list(bundles(sizes, 100))
    assert sorted(index for bundle in found for index in bundle) == list(range(len(sizes)))
    assert all(len(bundle) == 1 or sum(sizes[index] for index in bundle) <= 100 for bundle in found)
