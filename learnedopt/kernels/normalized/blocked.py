""":class:`~learnedopt.rules.NormalizedGradientRule` in place on blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.base import Tensors
from learnedopt.kernels.core.means import statistics_from_sums
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import NormalizedGradientRule, State, UpdateRule
from learnedopt.rules.normalized import Mean, Row


class Program(blocked.Program):
    """``scalars`` has the second moment, the statistics, and what becomes of them."""

    def __init__(self, rule: NormalizedGradientRule) -> None:
        super().__init__(rule, Sizes(features=0, outputs=0, scalars=5))
        self._config = rule.config

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, NormalizedGradientRule)

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(len(Mean), corrections.shape[1])
            if self._config.relative_eps:  # else nobody asks
                for block in self.blocks(tensors):
                    block.add_to(_in_range(block.views.grad).square_(), totals)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        rows = v.scalars.split([1, len(Row), 1, 1])
        square, found = block.open("square", 0, rows[0]), rows[2]
        numbers = block.of_tensors(statistics, rows[1])
        grad = _in_range(v.grad)
        torch.mul(grad, grad, out=found)
        if config.relative_eps:
            least = rows[3]
            torch.add(found, numbers[Row.FLOOR], out=least).clamp_(min=torch.finfo(grad.dtype).tiny)
            torch.mul(grad.mul_(found.div_(least)), grad, out=found).add_(numbers[Row.FLOOR])
        square.mul_(config.square_decay).add_(found, alpha=1.0 - config.square_decay)
        block.write("square", 0, square)
        torch.mul(square, numbers[Row.CORRECTION], out=found)
        found.clamp_(min=torch.finfo(grad.dtype).tiny).sqrt_().add_(config.eps)
        return grad.div_(found).neg_()


def _in_range(grad: Tensor) -> Tensor:
    """:func:`~learnedopt.rules.moments.in_range`, in place."""
    limit = 0.5 * math.sqrt(torch.finfo(grad.dtype).max)
    return grad.clamp_(-limit, limit)
