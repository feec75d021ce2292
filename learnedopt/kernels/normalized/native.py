""":class:`~learnedopt.rules.NormalizedGradientRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.kernels.core import native
from learnedopt.rules import NormalizedGradientRule
from learnedopt.rules.normalized import Mean, Row


class Settings(NamedTuple):
    """Named as in the rule's configuration."""

    square_decay: float
    eps: float
    relative_eps: float


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "normalized"
    entries = ("square",)
    settings_type = Settings
    rows, means = Row, Mean

    def __init__(self, rule: NormalizedGradientRule) -> None:
        super().__init__(None, [], [getattr(rule.config, name) for name in Settings._fields])
