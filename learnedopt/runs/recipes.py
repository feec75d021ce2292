"""Loading Python that lies outside the package: files, such as recipes, and modules."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_PREFIX = "learnedopt_recipe_"
"""Of the names of modules that are such files."""


def load_file(path: Path) -> ModuleType:
    """The module that a Python file outside the package is. What lies in its folder it can import, as a script can."""
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"{_PREFIX}{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A recipe may define dataclasses, such as a task family of its own, and those look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_python(name: str) -> ModuleType:
    """A Python file, if the name ends in ``.py``, else a module; those of the working folder are found too.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: there is no such module.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no Python file {name!r} to import")
        return load_file(Path(name))
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def home_of(thing: type) -> str | None:
    """What :func:`load_python` loads to have this class again: a module or a file; ``None`` for the package's own."""
    module = thing.__module__
    if module.partition(".")[0] == "learnedopt":
        return None
    if module == "__main__" or module.startswith(_PREFIX):
        return getattr(sys.modules.get(module), "__file__", None) or module
    return module
