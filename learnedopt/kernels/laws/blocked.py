""":class:`~learnedopt.rules.LawsRule` in place on blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.base import Tensors
from learnedopt.kernels.core.means import statistics_from_sums
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import LawsRule, State, UpdateRule
from learnedopt.rules.laws import Mean, Row


class Program(blocked.Program):
    """``scalars`` has the statistics, an entry of the state, and what becomes of it."""

    def __init__(self, rule: LawsRule) -> None:
        super().__init__(rule, Sizes(features=0, outputs=0, scalars=6))

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, LawsRule)
        limit = rule.way_limit

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(len(Mean), corrections.shape[1])
            for block in self.blocks(tensors):
                v = block.views
                products, way = v.scalars[:4], v.scalars[4:5]
                slope = block.read_own_grad(v.grad).clamp_(-limit, limit)
                block.read("origin", 0, way)  # not to be written: it stays
                way.sub_(v.param).clamp_(-limit, limit)
                factors = {
                    Mean.SLOPE_WAY: (slope, way),
                    Mean.SLOPE_SQUARE: (slope, slope),
                    Mean.WAY_SQUARE: (way, way),
                    Mean.PARAM_SQUARE: (v.param, v.param),
                }
                for mean, (left, right) in factors.items():
                    torch.mul(left, right, out=products[mean : mean + 1])
                block.add_to(products, totals)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v = block.views
        numbers = block.of_tensors(statistics, v.scalars[:4])
        rows = [numbers[row : row + 1] for row in Row]
        offset, delta = block.open("offset", 0, v.scalars[4:5]), v.scalars[5:6]
        torch.mul(offset, rows[Row.FROM_OFFSET], out=delta).addcmul_(rows[Row.FROM_DIRECTION], v.grad, value=-1.0)
        offset.addcmul_(rows[Row.STEP], v.grad, value=-1.0).mul_(rows[Row.KEPT])
        block.write("offset", 0, offset)
        return delta
