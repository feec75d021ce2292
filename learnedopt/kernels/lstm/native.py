""":class:`~learnedopt.rules.LSTMRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

from learnedopt.kernels.core import native
from learnedopt.rules import LSTMRule, UpdateRule


class Settings(NamedTuple):
    preprocess: bool
    preprocessing_p: float
    output_scale: float


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "lstm"
    settings_type = Settings

    def __init__(self, rule: LSTMRule) -> None:
        config = rule.config
        preprocess = config.preprocessing == "log_sign"
        settings = Settings(preprocess, config.preprocessing_p, config.output_scale)
        super().__init__(rule.lstm, native.linear(rule.readout), settings)

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        assert isinstance(rule, LSTMRule)
        return native.too_steep(rule.config.preprocessing_p)
