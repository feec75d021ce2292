""":class:`~learnedopt.rules.RNNpropRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.kernels.core import native
from learnedopt.rules import RNNpropRule
from learnedopt.rules.rnnprop import Row


class Settings(NamedTuple):
    """Named as in the rule's configuration."""

    momentum_decay: float
    square_decay: float
    eps: float
    output_scale: float


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "rnnprop"
    entries = ("momentum", "square")
    settings_type = Settings
    rows = Row

    def __init__(self, rule: RNNpropRule) -> None:
        settings = [getattr(rule.config, name) for name in Settings._fields]
        super().__init__(rule.lstm, (*native.linear(rule.inputs), *native.linear(rule.readout)), settings)
