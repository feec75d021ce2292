"""How :class:`~learnedopt.rules.SeparateLSTMRule` is taken apart: its rules each move their own tensors."""

from __future__ import annotations

from learnedopt.kernels.core.base import Backend, StepOptions, Tensors
from learnedopt.kernels.core.dispatch import step
from learnedopt.kernels.core.registry import register
from learnedopt.rules import LSTMRule, SeparateLSTMRule

_LEAST_DIMS = 3
"""Of how many dimensions a convolution's kernel is at least."""


def step_each(backend: Backend, rule: SeparateLSTMRule, tensors: Tensors, options: StepOptions) -> None:
    """A step of ``rule``; state is the same for both parts."""
    kernels = [index for index, param in enumerate(tensors.params) if param.dim() >= _LEAST_DIMS]
    rest = [index for index, param in enumerate(tensors.params) if param.dim() < _LEAST_DIMS]
    for part, indices in ((rule.convolutions, kernels), (rule.others, rest)):
        if indices:
            step(backend, part, tensors.select(indices), options)


def parts(rule: SeparateLSTMRule) -> list[LSTMRule]:
    return [rule.convolutions, rule.others]


register(SeparateLSTMRule, stepper=step_each, parts=parts)
