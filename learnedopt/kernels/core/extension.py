"""The compiled CPU kernels: built when first needed, then kept on disk.

One library has the operators of every folder of a rule that has a ``native.h``. Before each such header come the names
that its ``native.py`` gives to rows and settings (:meth:`~learnedopt.kernels.core.native.Program.declarations`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[1]
_SOURCE, _LIBRARY = "learnedopt.cpp", "learnedopt.so"
# Warnings are off because GCC 12 gives false ones for its own vector intrinsics.
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fopenmp", "-fPIC", "-shared", "-w"),
)


def why_unavailable() -> str | None:
    """Why the compiled kernels cannot be used here; ``None`` where they can.

    The first call compiles them, which takes some ten seconds and needs GCC or Clang: ``$CXX``, or ``c++``. Later
    ones, in this process and in others, find the result in torch's folder for extensions (``$TORCH_EXTENSIONS_DIR``
    or ``~/.cache/torch_extensions``), unless the sources, torch, the compiler's name or the processor have changed.
    """
    return _load()


def operators() -> Any:
    """The compiled operators, ``torch.ops.learnedopt``.

    Raises:
        RuntimeError: they are not available here; the message says why.
    """
    reason = _load()
    if reason is not None:
        raise RuntimeError(f"the compiled CPU kernels are not available: {reason}")
    return torch.ops.learnedopt


def is_compiled() -> bool:
    """Whether they need no compiling any more. This compiles nothing."""
    try:
        return sys.platform == "linux" and (_folder() / _LIBRARY).exists()
    except OSError:
        return False


@functools.cache
def _load() -> str | None:
    if sys.platform != "linux":
        return f"they are built on Linux only, and this is {sys.platform}"
    import fcntl  # is not there on other systems

    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / _LIBRARY
        # One process builds and the others wait. The system releases the lock of one that dies, and what that one
        # leaves is in a folder of its own: the library appears in its place complete or not at all.
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                if (compiler := shutil.which(_compiler())) is None:
                    return f"no C++ compiler: {_compiler()!r} is not found; install one or name it in CXX"
                with tempfile.TemporaryDirectory(dir=folder) as build:
                    (Path(build) / _SOURCE).write_text(_source())
                    command = _command(compiler, Path(build))
                    result = subprocess.run(command, capture_output=True, text=True, check=False)
                    if result.returncode:
                        return f"{compiler} failed: {result.stderr.strip()}"
                    (Path(build) / library.name).replace(library)
        torch.ops.load_library(library)
    except OSError as error:
        return str(error)
    return None


@functools.cache
def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    return Path(root) / f"learnedopt_{_key()}"


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _command(compiler: str, folder: Path) -> list[str]:
    """Compiles what is in ``folder``."""
    installed = Path(torch.__file__).parent
    return [
        compiler,
        *_FLAGS,
        str(folder / _SOURCE),
        *("-I", str(_ROOT)),
        *("-isystem", str(installed / "include")),
        *("-isystem", str(installed / "include" / "torch" / "csrc" / "api" / "include")),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-L", str(installed / "lib"), "-lc10", "-ltorch_cpu"),
        *("-o", str(folder / _LIBRARY)),
    ]


def _source() -> str:
    """All folders' operators."""
    lines = ["#include <vector>"]
    for header in sorted(_ROOT.glob("*/native.h")):
        folder = header.parent.name
        if header.with_suffix(".py").exists():
            program = importlib.import_module(f"learnedopt.kernels.{folder}.native").Program
            lines += [f"namespace learnedopt::{folder} {{", *program.declarations(), "}"]
        lines.append(f'#include "{folder}/native.h"')
    return "\n".join([*lines, ""])


def _key() -> str:
    """Changes with whatever the library depends on: what was compiled for one processor may not run on another."""
    parts = [_source(), *(path.read_text() for path in sorted(_ROOT.glob("*/*.h")))]
    parts += [*_FLAGS, torch.__version__, _compiler(), platform.machine(), _processor_features()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor_features() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()
