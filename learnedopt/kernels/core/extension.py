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
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[1]
_SOURCE, _LIBRARY = "learnedopt.cpp", "learnedopt.so"
_DIGEST, _FAILURE = "learnedopt.sha256", "failure.txt"
# Warnings are off because GCC 12 gives false ones for its own vector intrinsics.
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fopenmp", "-fPIC", "-shared", "-w"),
)


def why_unavailable() -> str | None:
    """Why the compiled kernels cannot be used here; ``None`` where they can.

    The first call compiles them, which takes some twenty seconds and needs GCC or Clang: ``$CXX``, or ``c++``. Later
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
        return sys.platform == "linux" and _is_whole(_folder() / _LIBRARY)
    except OSError:
        return False


@functools.cache
def compile_in_background() -> str:
    """Have another process compile them, for the processes to come; why this one does without, as a sentence's end.

    It runs at the lowest priority and outlives this one. Set ``LEARNEDOPT_COMPILE=0`` to have none.
    """
    if os.environ.get("LEARNEDOPT_COMPILE") == "0":
        return "it is not compiled on this machine, and LEARNEDOPT_COMPILE=0 says to leave it so"
    try:
        if sys.platform != "linux":
            return f"it is built on Linux only, and this is {sys.platform}"
        if shutil.which(_compiler()) is None:
            return f"there is no C++ compiler: {_compiler()!r} is not found; install one or name it in CXX"
        if (failure := _folder() / _FAILURE).exists():
            return f"it could not be compiled on this machine, as {failure} says"
        program = f"import os; os.nice(19); from {__name__} import _build; _build(wait=False)"
        # By way of a shell that ends at once, so that it is nobody's child and nobody has to wait for it.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" < /dev/null > /dev/null 2>&1 &', "sh", sys.executable, "-c", program],
            start_new_session=True,
            check=True,
            # Not this process's threads, and no process of its own in turn.
            env={**os.environ, "OMP_NUM_THREADS": "1", "LEARNEDOPT_COMPILE": "0"},
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"it is not compiled on this machine, and cannot be: {error}"
    return "it is being compiled now, in the background: programs that start later will have it"


@functools.cache
def _load() -> str | None:
    try:
        if not is_compiled() and (reason := _build(wait=True)) is not None:
            return reason
        torch.ops.load_library(_folder() / _LIBRARY)
    except OSError as error:
        return str(error)
    return None


def _build(*, wait: bool) -> str | None:
    """Compile, unless another process has or, if this one need not wait for it, does; why that failed, if it did."""
    if sys.platform != "linux":
        return f"they are built on Linux only, and this is {sys.platform}"
    import fcntl  # is not there on other systems

    if (compiler := shutil.which(_compiler())) is None:
        return f"no C++ compiler: {_compiler()!r} is not found; install one or name it in CXX"
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    # One process builds and the others wait. The system releases the lock of one that dies, and what that one leaves is
    # in a folder of its own: the library appears in its place complete or not at all.
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another process compiles them"
        if _is_whole(folder / _LIBRARY):
            return None
        with tempfile.TemporaryDirectory(dir=folder) as build:
            (Path(build) / _SOURCE).write_text(_source())
            command = _command(compiler, Path(build))
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                reason = f"{compiler} failed: {result.stderr.strip()}"
                (folder / _FAILURE).write_text(f"{shlex.join(command)}\n{reason}\n")
                return reason
            library = Path(build) / _LIBRARY
            (folder / _DIGEST).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
            library.replace(folder / _LIBRARY)
        (folder / _FAILURE).unlink(missing_ok=True)
    return None


def _is_whole(library: Path) -> bool:
    """Whether a library is there as it was built: the system may kill a program that maps one that is cut short."""
    digest = library.with_name(_DIGEST)
    if not library.exists() or not digest.exists():
        return False
    return hashlib.sha256(library.read_bytes()).hexdigest() == digest.read_text()


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
