"""The raw file of a benchmark survives being killed at any byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learnedopt.evaluation import records

NUMBERS = st.floats(1e-30, 1e30) | st.just(np.inf)


@given(st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=1, max_size=5))
def test_numbers_come_back_to_five_digits_and_infinity_as_infinity(values: list[list[float]]) -> None:
    array = np.array(values)
    again = records.decode(records.encode(array))
    assert np.array_equal(np.isinf(again), np.isinf(array))
    finite = np.isfinite(array)
    np.testing.assert_allclose(again[finite], array[finite], rtol=5e-5)


def test_nan_counts_as_infinite() -> None:
    assert records.encode([float("nan"), 1.0]) == [None, 1.0]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for number in range(3):
        records.append(path, {"kind": "run", "number": number})
    assert records.read(path) == [{"kind": "run", "number": number} for number in range(3)]


def test_wherever_a_line_is_torn_the_others_stay_and_more_can_follow(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second, third = ({"kind": "run", "name": name} for name in "abc")
    records.append(path, first)
    whole = path.stat().st_size
    records.append(path, second)
    data = path.read_bytes()
    for length in range(whole, len(data)):
        path.write_bytes(data[:length])
        # Without its newline alone, a line is whole.
        kept = [first, second] if length == len(data) - 1 else [first]
        assert records.read(path) == kept
        records.append(path, third)
        assert records.read(path) == [*kept, third]


@pytest.mark.parametrize("line", ["[1, 2]", '{"task": "siren"}', "3"])
def test_what_is_no_record_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no record of a benchmark"):
        records.read(path)


def test_a_byte_that_changes_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for number in (1, 2, 3):
        records.append(path, {"kind": "run", "losses": [0.5, number]})
    data = path.read_bytes()
    first, second, _ = (place for place, byte in enumerate(data) if byte == ord("\n"))
    for place in range(first + 1, second + 1):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"line [23] of .*results.jsonl was changed after it was written"):
                records.read(path)


def test_lines_without_a_checksum_load_and_may_be_followed_by_others(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind":"run","losses":[0.5]}\n')
    records.append(path, {"kind": "skip"})
    assert records.read(path) == [{"kind": "run", "losses": [0.5]}, {"kind": "skip"}]
