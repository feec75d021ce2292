"""What pytest collects beside the tests: the doctests of every module that can be imported here."""

from __future__ import annotations

import importlib.util

_TRITON = "learnedopt/kernels/*/triton.py"

collect_ignore_glob = [] if importlib.util.find_spec("triton") else [_TRITON]


def pytest_report_header() -> str | None:
    return f"not collected: {_TRITON} (triton is not installed)" if collect_ignore_glob else None
