"""The raw file of a benchmark: a line of JSON for everything that finished, with a checksum at its end."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
_SIGNED = re.compile(r'(.*),"sha256":"([0-9a-f]{64})"\}', re.DOTALL)
"""A line: the record without its last brace, and the sha256 of the whole record."""
_TORN = re.compile(r'.*,"sha256":"[0-9a-f]{0,64}"?', re.DOTALL)
_SIGNATURE = re.compile("[0-9a-f]{24}")
"""What is left of a checksum, whichever byte of it was changed."""


def encode(values: Any, digits: int = 5) -> Any:
    """Numbers, or nested lists or an array of them, of so many digits; ``None`` for infinity, which JSON lacks.

    >>> encode(np.array([0.1234567, np.inf]))
    [0.12346, None]
    """
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list | tuple):
        return [encode(value, digits) for value in values]
    return float(f"{values:.{digits}g}") if math.isfinite(values) else None


def decode(values: Any) -> np.ndarray:
    """The array that :func:`encode` was given.

    >>> decode([[1.0, None]])
    array([[ 1., inf]])
    """
    array = np.array(values, dtype=object)
    return np.where(array == None, math.inf, array).astype(np.float64)  # noqa: E711 elementwise


def append(path: Path, record: Record) -> None:
    """Add a record as the last line, whole or, if the program is killed meanwhile, as a torn line that is overlooked.

    Several processes may append to one file: each line is a single write.
    """
    text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    line = f'{text[:-1]},"sha256":"{_digest(text)}"}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not buffered: what is written at once arrives at once. A torn line is closed first, lest it spoil this one.
    torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
    with open(path, "ab", buffering=0) as file:
        file.write((("\n" if torn else "") + line).encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """All records in order. Of a torn line nothing is known; a line that is torn and not the last one was closed later.

    Lines that version 0.1 wrote have no checksum, and are taken as they are.

    Raises ``FileNotFoundError`` if there is no such file, ``ValueError`` if a whole line is not a record, or was
    changed after it was written.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        signed = _SIGNED.fullmatch(line)
        text = f"{signed[1]}}}" if signed else line
        if _TORN.fullmatch(line):
            continue
        if _digest(text) != signed[2] if signed else _SIGNATURE.search(line[-66:]):
            raise ValueError(
                f"line {number} of {path} was changed after it was written: its checksum is another. Remove the line, "
                "and the same command measures it again"
            )
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"line {number} of {path} is no record of a benchmark: {line[:60]}")
        records.append(record)
    return records


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
