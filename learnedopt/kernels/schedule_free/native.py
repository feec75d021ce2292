""":class:`~learnedopt.rules.ScheduleFreeLSTMRule` for the compiled kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from learnedopt.kernels.core import native
from learnedopt.kernels.schedule_free.rows import Mean, Row
from learnedopt.rules import ScheduleFreeLSTMRule


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

    def __init__(self, rule: ScheduleFreeLSTMRule) -> None:
        settings = [*(getattr(rule.config, name) for name in Settings._fields[:-1]), rule.way_limit]
        # In the order in which the kernel reads it.
        readout = torch.cat([rule.readout.weight.T, rule.readout.bias.unsqueeze(0)])
        super().__init__(rule.lstm, [readout], settings)
