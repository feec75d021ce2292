""":class:`~learnedopt.rules.MetaLSTMRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.kernels.core import native
from learnedopt.rules import MetaLSTMRule, UpdateRule
from learnedopt.rules.meta_lstm import Row


class Settings(NamedTuple):
    preprocessing_p: float
    gradient_divisor: float
    feed_back_gate: bool


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "meta_lstm"
    entries = ("forget", "input")
    settings_type = Settings
    rows = Row

    def __init__(self, rule: MetaLSTMRule) -> None:
        config = rule.config
        settings = Settings(config.preprocessing_p, config.gradient_divisor, config.gate_feedback == "gate")
        weights = (*native.linear(rule.forget_gate), *native.linear(rule.input_gate))
        super().__init__(rule.lstm, weights, settings)

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        assert isinstance(rule, MetaLSTMRule)
        return native.too_steep(rule.config.preprocessing_p)
