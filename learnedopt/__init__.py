"""Learned optimizers for PyTorch, with the interface of ``torch.optim``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnedopt.optim import LearnedOptimizer, LSTMOptimizer, MetaLSTMOptimizer
    from learnedopt.zoo import list_entries, load_rule

__version__ = "0.1.0"

__all__ = ["LSTMOptimizer", "LearnedOptimizer", "MetaLSTMOptimizer", "list_entries", "load_rule"]

_HOMES = {
    **dict.fromkeys(("LSTMOptimizer", "LearnedOptimizer", "MetaLSTMOptimizer"), "learnedopt.optim"),
    **dict.fromkeys(("list_entries", "load_rule"), "learnedopt.zoo"),
}
_ROOMS = ("kernels", "optim", "rules", "storage", "zoo")


def __getattr__(name: str) -> Any:
    """Imported when it is first asked for: torch takes seconds, and ``learnedopt --help`` needs none of it."""
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        found = importlib.import_module(f"learnedopt.{name}")
    else:
        raise AttributeError(f"module 'learnedopt' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
