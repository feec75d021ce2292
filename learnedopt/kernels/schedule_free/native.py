""":class:`~learnedopt.rules.ScheduleFreeRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from learnedopt.kernels.core import native
from learnedopt.kernels.schedule_free.modulators import unknown_modulator
from learnedopt.rules import ScheduleFreeRule, UpdateRule
from learnedopt.rules.modulators import LinearReadout
from learnedopt.rules.schedule_free import Mean, Row


class Settings(NamedTuple):
    """Named as in the rule's configuration, but for the last."""

    momentum_decay: float
    square_decay: float
    eps: float
    nominal_step: float
    interpolation: float
    log_step_gain: float
    log_step_bound: float
    mix_bound: float
    log_averaging_bound: float
    way_limit: float


class Program(native.Program):
    """What ``native.h`` takes."""

    operator = "schedule_free"
    entries = ("momentum", "square", "offset")
    entries_of_sums = (*entries, "origin")
    settings_type = Settings
    rows, means = Row, Mean

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        return unknown_modulator(rule)

    def __init__(self, rule: ScheduleFreeRule) -> None:
        settings = [*(getattr(rule.config, name) for name in Settings._fields[:-1]), rule.way_limit]
        # In the order in which the kernel reads it.
        modulator = rule.modulator
        assert isinstance(modulator, LinearReadout)
        readout = torch.cat([modulator.readout.weight.T, modulator.readout.bias.unsqueeze(0)])
        super().__init__(modulator.lstm, [readout], settings)
