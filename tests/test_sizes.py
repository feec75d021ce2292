"""No file, class or function of the package outgrows what a reader can hold in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import learnedopt

PACKAGE = Path(learnedopt.__file__).parent
FILE_LINES, CLASS_LINES, PARAMETERS = 450, 200, 8


def too_large(name: str, source: str) -> Iterator[str]:
    """The file, and its classes and functions by name, that are above the limits."""
    if source.count("\n") > FILE_LINES:
        yield name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            large = node.end_lineno - node.lineno + 1 > CLASS_LINES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # What Triton compiles takes addresses and numbers one by one, as a binding of C does.
            if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                continue
            arguments = node.args
            # Options by name that have a default are for those who want them: they are counted apart.
            defaults = zip(arguments.kwonlyargs, arguments.kw_defaults)
            options = [one for one, default in defaults if default is not None]
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            needed = [one for one in every if one is not None and one not in options and one.arg not in ("self", "cls")]
            large = max(len(needed), len(options)) > PARAMETERS
        else:
            continue
        if large:
            yield f"{name}: {node.name}"


def test_nothing_is_too_large() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.glob("**/*.py")}
    assert [found for name, source in files.items() for found in too_large(name, source)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 1\n" * 450, []),
        ("x = 1\n" * 451, ["new.py"]),
        ("class A:\n" + "    x = 1\n" * 199, []),
        ("class A:\n" + "    x = 1\n" * 200, ["new.py: A"]),
        ("def f(a, b, c, /, d, *, e, f, g, h): ...\n", []),
        ("def f(a, b, c, /, d, *e, f, g, h, **i): ...\n", ["new.py: f"]),
        ("def f(a, b, c, d, *, e=1, f=1, g=1, h=1, i=1, j=1, k=1, l=1): ...\n", []),
        ("def f(a, *, e=1, f=1, g=1, h=1, i=1, j=1, k=1, l=1, m=1): ...\n", ["new.py: f"]),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n", []),
        ("class A:\n    async def f(self, a, b, c, d, e, f, g, h, i): ...\n", ["new.py: f"]),
    ],
)
def test_what_is_above_a_limit_is_noticed(source: str, found: list[str]) -> None:
    assert list(too_large("new.py", source)) == found
