""":class:`~learnedopt.rules.AdamLSTMRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.kernels.core import native
from learnedopt.rules import AdamLSTMRule
from learnedopt.rules.adam_lstm import Mean, Row


class Settings(NamedTuple):
    """Named as in the rule's configuration."""

    fast_decay: float
    slow_decay: float
    square_decay: float
    eps: float
    nominal_step: float
    log_step_gain: float
    log_step_bound: float
    mix_bound: float


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "adam_lstm"
    entries = entries_of_sums = ("fast", "slow", "square")
    settings_type = Settings
    rows, means = Row, Mean

    def __init__(self, rule: AdamLSTMRule) -> None:
        settings = [getattr(rule.config, name) for name in Settings._fields]
        super().__init__(rule.lstm, native.linear(rule.readout), settings)
