"""Entry points of ``torch.hub``, for use without installing: ``torch.hub.load(repository, "rule", "default")``."""

from __future__ import annotations

from typing import Any

from learnedopt.optim import LearnedOptimizer
from learnedopt.rules import UpdateRule
from learnedopt.zoo import load_rule

dependencies = ["numpy", "safetensors", "torch"]


def learned_optimizer(params: Any, **settings: Any) -> LearnedOptimizer:
    """A :class:`learnedopt.optim.LearnedOptimizer` for ``params``, with its keyword arguments."""
    return LearnedOptimizer(params, **settings)


def rule(name: str = "default") -> UpdateRule:
    """A trained rule of the zoo, by name."""
    return load_rule(name)
