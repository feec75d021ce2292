"""How :class:`~learnedopt.rules.SeparateLSTMRule` is taken apart: its rules each move their own tensors."""

from __future__ import annotations

from learnedopt.kernels.core.base import Backend, StepOptions, Tensors
from learnedopt.kernels.core.dispatch import step
from learnedopt.kernels.core.registry import register
from learnedopt.rules import LSTMRule, SeparateLSTMRule


def step_each(backend: Backend, rule: SeparateLSTMRule, tensors: Tensors, options: StepOptions) -> None:
    """A step of ``rule``; state is the same for both parts."""
    dims = tensors.dims or [param.dim() for param in tensors.params]
    for part in parts(rule):
        if indices := [index for index, its in enumerate(dims) if rule.serving(its) is part]:
            step(backend, part, tensors.select(indices), options)


def parts(rule: SeparateLSTMRule) -> list[LSTMRule]:
    return [rule.convolutions, rule.others]


register(SeparateLSTMRule, stepper=step_each, parts=parts)
