"""Where the compiled kernels can be had, and what is said where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from learnedopt.kernels.core import extension

ROOT = Path(extension.__file__).parents[3]
PROGRAM = """
from learnedopt.kernels.core import extension
reason = extension.why_unavailable()
if reason is not None:
    try:
        extension.operators()
    except RuntimeError as error:
        assert reason in str(error)
        raise SystemExit(reason)
"""


COMPILER = """#!/bin/sh
echo started >> {log}
sleep 1
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""
"""Copies what was compiled before."""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that loads the kernels; it exits with the reason where it cannot."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_was_compiled_once_loads_without_a_word_and_without_a_compiler(tmp_path: Path) -> None:
    if reason := extension.why_unavailable():
        pytest.skip(reason)
    result = run(PATH=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    result = run(PATH=str(tmp_path), CXX="clang-of-the-future", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("no C++ compiler: 'clang-of-the-future' is not found")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "broken-compiler").write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    (tmp_path / "broken-compiler").chmod(0o755)
    result = run(CXX=str(tmp_path / "broken-compiler"), TORCH_EXTENSIONS_DIR=str(tmp_path / "built"))
    assert result.returncode == 1
    assert "out of cheese" in result.stderr
    assert not list(tmp_path.glob("built/**/*.so"))


def test_of_several_processes_one_compiles(tmp_path: Path) -> None:
    if reason := extension.why_unavailable():
        pytest.skip(reason)
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(COMPILER.format(log=log, library=extension._folder() / extension._LIBRARY))
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert log.read_text() == "started\n"


BACKEND = """
import torch
from learnedopt import LearnedOptimizer
from learnedopt.kernels import Case, choose
from learnedopt.rules import LSTMRule
print(LearnedOptimizer([torch.ones(2)], rule=LSTMRule()).backend)
print(choose(Case(LSTMRule(), torch.device("cpu"), torch.float32, "float32"))[1].get("native"))
"""


def backend(**environment: str) -> list[str]:
    """What serves a fresh process by itself, and why that is not the compiled kernels."""
    command = [sys.executable, "-W", "error", "-c", BACKEND]
    result = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """An environment whose compiler copies what was compiled before."""
    if reason := extension.why_unavailable():
        pytest.skip(reason)
    path = tmp_path / "compiler"
    path.write_text(COMPILER.format(log=tmp_path / "log", library=extension._folder() / extension._LIBRARY))
    path.chmod(0o755)
    return {"CXX": str(path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}


def test_kernels_are_compiled_in_the_background_for_the_programs_to_come(
    compiler: dict[str, str], tmp_path: Path
) -> None:
    first = backend(**compiler, LEARNEDOPT_COMPILE="1")
    assert first[0] == "blocked" and "in the background" in first[1]
    for _ in range(600):
        if list(tmp_path.glob(f"built/*/{extension._LIBRARY}")):
            break
        time.sleep(0.1)
    assert backend(**compiler, LEARNEDOPT_COMPILE="1") == ["native", "None"]


def test_nothing_is_compiled_where_that_is_not_wanted(compiler: dict[str, str], tmp_path: Path) -> None:
    found, reason = backend(**compiler, LEARNEDOPT_COMPILE="0")
    assert found == "blocked" and "LEARNEDOPT_COMPILE=0" in reason
    time.sleep(1.0)
    assert not (tmp_path / "log").exists()


def test_what_could_not_be_compiled_is_not_tried_again_in_the_background(tmp_path: Path) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    assert run(**environment).returncode == 1
    found, reason = backend(**environment, LEARNEDOPT_COMPILE="1")
    assert found == "blocked" and "could not be compiled" in reason
    (failure,) = tmp_path.glob(f"built/*/{extension._FAILURE}")
    assert "out of cheese" in failure.read_text()


def test_a_library_that_was_cut_short_is_built_again(compiler: dict[str, str], tmp_path: Path) -> None:
    assert run(**compiler).returncode == 0
    (library,) = tmp_path.glob(f"built/*/{extension._LIBRARY}")
    library.write_bytes(library.read_bytes()[:100_000])
    assert run(**compiler).returncode == 0
    assert (tmp_path / "log").read_text() == "started\nstarted\n"


def test_a_library_in_a_folder_that_cannot_be_written_is_used(compiler: dict[str, str], tmp_path: Path) -> None:
    assert run(**compiler).returncode == 0
    (folder,) = tmp_path.glob("built/*")
    (folder / "lock").unlink()
    folder.chmod(0o555)
    try:
        assert backend(**compiler)[0] == "native"
    finally:
        folder.chmod(0o755)


def test_a_library_compiled_for_another_processor_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    key = extension._key()
    assert key == extension._key()
    monkeypatch.setattr(extension, "_processor_features", lambda: "flags: fpu")
    assert extension._key() != key
