"""Loading the Python file that a recipe is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """The module that a Python file outside the package is. What lies in its folder it can import, as a script can."""
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"learnedopt_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A recipe may define dataclasses, such as a task family of its own, and those look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
