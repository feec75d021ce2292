"""The rooms of the package import one way only."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
import torch

import learnedopt

PACKAGE = Path(learnedopt.__file__).parent
ROOMS = (
    "runs",
    "rules",
    "kernels",
    "storage",
    "zoo",
    "optim",
    "data",
    "tasks",
    "meta",
    "fewshot",
    "evaluation",
    "demo",
    "cli",
)
"""Each may import from those before it."""
DOORS = {"__init__": "optim", "__main__": "cli"}
"""Files that belong to no room, and the last room they may import from."""


def modules() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.glob("**/*.py"))


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_rooms(source: str) -> Iterator[str]:
    """The rooms that import statements name, also those inside functions; ``__init__`` for the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            # ``from learnedopt import zoo`` names the room last; any other such name is the package's own.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "learnedopt":
                yield parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def imported_modules(source: str) -> Iterator[str]:
    """The modules of the package that import statements name, however they do: ``from a import b`` names ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "learnedopt")


def violations_in_kernels(path: Path, source: str) -> list[str]:
    """In the kernels' core and in the folders of rules."""
    folder = path.parts[1]
    allowed = ["learnedopt.kernels.core"]
    if folder == "core":
        allowed += [f"learnedopt.rules.{name}" for name in ("base", "moments", "recurrent")]
    else:
        allowed += ["learnedopt.rules", f"learnedopt.kernels.{folder}"]
    return [name for name in imported_modules(source) if not any(f"{name}.".startswith(f"{x}.") for x in allowed)]


def violations(path: Path, source: str) -> list[str]:
    room = room_of(path)
    limit = ROOMS.index(DOORS.get(room, room))
    allowed = {room, *ROOMS[: limit + (room in DOORS)]}
    if ROOMS[limit] == "cli":
        allowed.add("__init__")
    return [found for found in imported_rooms(source) if found not in allowed]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_room_imports_only_from_rooms_before_it(path: Path) -> None:
    assert room_of(path) in (*ROOMS, *DOORS), f"{path} is in no room: give it a place in ROOMS and in the documents"
    assert violations(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize("path", [path for path in modules() if path.match("kernels/*/*.py")], ids=str)
def test_the_core_of_the_kernels_knows_no_rule_and_rules_know_the_core_alone(path: Path) -> None:
    assert violations_in_kernels(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("kernels/core/new.py", "from learnedopt.rules.base import State", []),
        ("kernels/core/new.py", "from learnedopt.rules import LSTMRule", ["learnedopt.rules.LSTMRule"]),
        ("kernels/core/new.py", "import learnedopt.kernels.lstm.native", ["learnedopt.kernels.lstm.native"]),
        ("kernels/lstm/new.py", "from learnedopt.rules import LSTMRule\nimport learnedopt.kernels.core.blocked", []),
        ("kernels/lstm/new.py", "from learnedopt.kernels.core import blocked, native", []),
        ("kernels/lstm/new.py", "from learnedopt.kernels import rnnprop", ["learnedopt.kernels.rnnprop"]),
    ],
)
def test_imports_the_wrong_way_within_the_kernels_are_noticed(path: str, source: str, found: list[str]) -> None:
    assert violations_in_kernels(Path(path), source) == found


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("rules/new.py", "import torch\nfrom learnedopt.rules.base import State", []),
        ("rules/new.py", "from learnedopt.zoo import load_rule", ["zoo"]),
        ("optim/new.py", "def f():\n    import learnedopt.tasks.mlp", ["tasks"]),
        ("optim/new.py", "from learnedopt import LearnedOptimizer, zoo", ["__init__"]),
        ("meta/new.py", "from learnedopt import evaluation, tasks, zoo", ["evaluation"]),
        ("cli/new.py", "from learnedopt import __version__, demo", []),
        ("__init__.py", "from learnedopt.optim import LearnedOptimizer\nfrom learnedopt.data import digits", ["data"]),
    ],
)
def test_imports_the_wrong_way_are_noticed(path: str, source: str, found: list[str]) -> None:
    assert violations(Path(path), source) == found


def test_the_document_names_every_room_that_there_is() -> None:
    document = PACKAGE.parent / "docs" / "architecture.md"
    text = document.read_text()
    rooms = {room_of(path) for path in modules()} - DOORS.keys()
    assert {room for room in rooms if f"`learnedopt/{room}" not in text} == set()


DOCUMENT = (PACKAGE.parent / "docs" / "architecture.md").read_text()


def test_every_name_of_the_document_can_be_found() -> None:
    names = sorted({word for word in DOCUMENT.split("`")[1::2] if re.fullmatch(r"learnedopt(\.\w+)+", word)})
    assert len(names) > 30
    for name in names:
        pkgutil.resolve_name(name)


def walks(title: str) -> list[list[str]]:
    """The lists of a walk, each of the names that its items begin with."""
    section = DOCUMENT.split(f"## {title}\n")[1].split("\n## ")[0]
    items = re.findall(r"^(\d+)\. `([\w.]+)`", section, re.MULTILINE)
    lists: list[list[str]] = []
    for number, name in items:
        if number == "1":
            lists.append([])
        lists[-1].append(name)
    return lists


def calls(name: str) -> set[str]:
    """The last parts of the names that a function calls, or hands on."""
    function = inspect.unwrap(pkgutil.resolve_name(name))
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    }


def files(name: str) -> str:
    source = inspect.getsourcefile(inspect.unwrap(pkgutil.resolve_name(name)))
    assert source is not None
    return str(Path(source).relative_to(PACKAGE))


@pytest.mark.parametrize(
    ("title", "others", "most"),
    [
        ("The walk of a gradient", [], 6),
        ("The walk of a meta-gradient", ["learnedopt.meta.recipe.Recipe.trainer", "learnedopt.rules.LSTMRule"], 7),
        ("The walk of an episode", ["learnedopt.fewshot.fast.convolution.convolution"], 5),
    ],
)
def test_a_walk_goes_from_call_to_call_through_few_files(title: str, others: list[str], most: int) -> None:
    """Down: each function calls the next, and no file is come back to but where one list ends and the next begins."""
    lists = walks(title)
    assert lists and all(len(names) > 2 for names in lists)
    for one, other in pairwise(lists):
        assert other[0] in one
    for names in lists:
        for caller, called in pairwise(names):
            assert called.split(".")[-1] in calls(caller), f"{caller} does not call {called}"
    assert len({files(name) for names in (*lists, others) for name in names}) <= most


def test_a_step_of_the_default_goes_the_way_that_the_walk_tells() -> None:
    param = torch.ones(6, 5, requires_grad=True)
    optimizer = learnedopt.LearnedOptimizer([param], backend="blocked")
    found: set[str] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.add(str(path.relative_to(PACKAGE)))

    for steps in (2, 1):
        for _ in range(steps):
            param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(steps))
            if steps == 1:
                sys.setprofile(record)
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
    walked = {files(name) for names in walks("The walk of a gradient") for name in names}
    assert walked | {"rules/laws.py"} <= found
