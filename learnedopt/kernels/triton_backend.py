"""One launch for a step on CUDA: preprocessing, LSTM, read-out and the update of parameters in one pass over the state.

Nothing waits for the device: a tensor ``lr`` and ``skip`` are read by the kernel. Addresses go to the device in a table
that is kept as long as they stay the same, as they do under CUDA graphs once a few steps have been taken before the
capture.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from learnedopt.kernels.adam_lstm import MOMENTS, statistics_from_sums
from learnedopt.kernels.base import Backend, Case, Tensors
from learnedopt.kernels.state import SCALE
from learnedopt.rules import AdamLSTMRule, LSTMRule, MetaLSTMRule, Segments, State, UpdateRule

CHUNK, BLOCK = 1024, 64
"""Coordinates of one program, and those it works on at once."""
LARGEST = 64
"""Units of a layer at most: its tiles must stay in registers."""
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class TritonBackend(Backend):
    """Triton kernels for the rules of this package, on CUDA; on the CPU under Triton's interpreter, to test them."""

    name: ClassVar[str] = "triton"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cuda" and not (case.device.type == "cpu" and _interpreted()):
            return f"it runs on CUDA, and the parameters are on {case.device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if case.dtype != torch.float32:
            return f"it computes in float32, and this takes {case.dtype}"
        # By exact type: a subclass may compute something else.
        if type(case.rule) not in _CODES:
            known = ", ".join(rule.__name__ for rule in _CODES)
            return f"it knows the rules {known}, and this is {type(case.rule).__name__}"
        if (units := case.rule.config.hidden_size) > LARGEST:  # type: ignore[attr-defined]
            return f"it takes rules of up to {LARGEST} units, and this has {units}"
        return None

    def unprepared(self) -> str | None:
        return "Triton's interpreter is for tests" if _interpreted() else None

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        if not isinstance(rule, AdamLSTMRule):  # the others look at no coordinate
            none = torch.empty(0, dtype=tensors.dtype, device=tensors.device)
            return rule.statistics(none, none, {}, Segments([0] * len(tensors.params)), loss)

        def sums(corrections: Tensor) -> Tensor:
            totals = torch.zeros_like(corrections)
            for batch in _batches(tensors):
                totals[:, batch.first : batch.first + len(batch.indices)] = batch.sums(rule, corrections)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def update(
        self,
        rule: UpdateRule,
        tensors: Tensors,
        statistics: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
        skip: Tensor | None,
    ) -> None:
        raise NotImplementedError


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
