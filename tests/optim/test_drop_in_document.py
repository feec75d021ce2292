"""Every claim of the page about dropping in has a test, and the test exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "drop_in.md").read_text()
PROOFS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), PROOFS, ids=[name for _, name in PROOFS])
def test_the_proof_of_a_claim_exists(file: str, name: str) -> None:
    assert name in functions(file)


def test_every_row_names_its_proof() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| | ")]
    assert len(rows) > 40
    assert [row for row in rows if not re.search(r"::\w+` \|$", row)] == []
