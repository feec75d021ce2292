"""Where the compiled kernels can be had, and what is said where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_a_library_compiled_for_another_processor_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    key = extension._key()
    assert key == extension._key()
    monkeypatch.setattr(extension, "_processor_features", lambda: "flags: fpu")
    assert extension._key() != key
