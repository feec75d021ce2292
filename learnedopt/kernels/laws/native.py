""":class:`~learnedopt.rules.LawsRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.kernels.core import native
from learnedopt.rules import LawsRule
from learnedopt.rules.laws import Mean, Row


class Settings(NamedTuple):
    """What the kernels need."""

    way_limit: float


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "laws"
    entries = ("offset",)
    entries_of_sums = ("origin",)
    settings_type = Settings
    rows, means = Row, Mean

    def __init__(self, rule: LawsRule) -> None:
        super().__init__(None, [], [rule.way_limit])
