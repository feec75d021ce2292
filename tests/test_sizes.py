"""No file, class or function of the package outgrows what a reader can hold in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import learnedopt

PACKAGE = Path(learnedopt.__file__).parent
FILE_LINES, CLASS_LINES, PARAMETERS = 450, 200, 8
EXCEPTIONS = {
    "fewshot/episodes.py",
    "fewshot/learner.py",
    "fewshot/learner.py: Learner",
    "fewshot/training.py",
    "fewshot/training.py: FewShotRun",
    "fewshot/vectorized.py: apply",
    "kernels/blocked.py",
    "kernels/triton_kernels.py",
    "kernels/triton_kernels.py: _averages",
    "kernels/triton_kernels.py: _directions",
    "kernels/triton_kernels.py: _load_units",
    "kernels/triton_kernels.py: _store_units",
    "kernels/triton_kernels.py: step_kernel",
    "kernels/triton_kernels.py: sums_kernel",
    "meta/trainer.py: MetaTrainer",
    "optim/optimizer.py",
    "optim/optimizer.py: LearnedOptimizer",
    "rules/eigenbasis.py: EigenbasisRule",
    "rules/schedule_free_lstm.py: ScheduleFreeLSTMRule",
}
"""What is too large still. Nothing may join it; what has become small enough leaves it."""


def too_large(name: str, source: str) -> Iterator[str]:
    """The file, and its classes and functions by name, that are above the limits."""
    if source.count("\n") > FILE_LINES:
        yield name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            large = node.end_lineno - node.lineno + 1 > CLASS_LINES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            large = sum(one is not None and one.arg not in ("self", "cls") for one in every) > PARAMETERS
        else:
            continue
        if large:
            yield f"{name}: {node.name}"


def test_what_is_too_large_is_known() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.glob("**/*.py")}
    assert {found for name, source in files.items() for found in too_large(name, source)} == EXCEPTIONS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 1\n" * 450, []),
        ("x = 1\n" * 451, ["new.py"]),
        ("class A:\n" + "    x = 1\n" * 199, []),
        ("class A:\n" + "    x = 1\n" * 200, ["new.py: A"]),
        ("def f(a, b, c, /, d, *, e, f, g, h): ...\n", []),
        ("def f(a, b, c, /, d, *e, f, g, h, **i): ...\n", ["new.py: f"]),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n", []),
        ("class A:\n    async def f(self, a, b, c, d, e, f, g, h, i): ...\n", ["new.py: f"]),
    ],
)
def test_what_is_above_a_limit_is_noticed(source: str, found: list[str]) -> None:
    assert list(too_large("new.py", source)) == found
