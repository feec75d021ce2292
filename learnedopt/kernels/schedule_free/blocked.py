""":class:`~learnedopt.rules.ScheduleFreeRule` in place on blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.base import Tensors
from learnedopt.kernels.core.blocked_lstm import Layers
from learnedopt.kernels.core.blocked_maths import adam_directions
from learnedopt.kernels.core.means import statistics_from_sums
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.kernels.schedule_free.modulators import unknown_modulator
from learnedopt.rules import ScheduleFreeRule, State, UpdateRule
from learnedopt.rules.modulators import LinearReadout
from learnedopt.rules.schedule_free import Mean, Row

_COORDINATE_FEATURES = 4
_FEATURES = _COORDINATE_FEATURES + len(Row) - Row.FEATURES


class Program(blocked.Program):
    """``scalars`` has the state's numbers, those of tensors that are no features, and the running RMS."""

    def __init__(self, rule: ScheduleFreeRule) -> None:
        sizes = Sizes(_FEATURES, outputs=4, scalars=9)
        modulator = rule.modulator
        assert isinstance(modulator, LinearReadout)
        if modulator.lstm is not None:
            hidden, layers = modulator.lstm.hidden_size, modulator.lstm.num_layers
            sizes = Sizes(_FEATURES, outputs=4, scalars=9, hidden=hidden, layers=layers)
        super().__init__(rule, sizes)
        self._config = rule.config
        self._lstm = None if modulator.lstm is None else Layers(modulator.lstm)
        self._readout_of_features = modulator.readout.weight[:, :_FEATURES].contiguous()
        self._readout = torch.cat([modulator.readout.weight[:, _FEATURES:], modulator.readout.bias.unsqueeze(1)], dim=1)

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        return unknown_modulator(rule)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, ScheduleFreeRule)
        limit = rule.way_limit

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(len(Mean), corrections.shape[1])
            for block in self.blocks(tensors):
                v = block.views
                numbers = v.scalars[:4].split(1)  # not the state's own: it has not moved yet
                for name, row in zip(("momentum", "square", "offset", "origin"), numbers):
                    block.read(name, 0, row)
                momentum, square, offset, way = numbers
                of_coordinates = block.of_tensors(corrections, v.scalars[4:6])
                a, g = self._directions(block, of_coordinates, momentum, square)
                way.sub_(v.param).clamp_(-limit, limit)
                slope = block.read_own_grad(v.features[10:11]).clamp_(-limit, limit)
                factors = {
                    Mean.PARAM_SQUARE: (v.param, v.param),
                    Mean.A_G: (a, g),
                    Mean.A_SQUARE: (a, a),
                    Mean.OFFSET_SQUARE: (offset, offset),
                    Mean.OFFSET_A: (offset, a),
                    Mean.SLOPE_WAY: (slope, way),
                    Mean.SLOPE_SQUARE: (slope, slope),
                    Mean.WAY_SQUARE: (way, way),
                }
                products = v.features[2:10]
                for mean, (left, right) in factors.items():
                    torch.mul(left, right, out=products[mean : mean + 1])
                block.add_to(products, totals)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        rows = zip(("momentum", "square", "offset"), v.scalars[:3].split(1))
        momentum, square, offset = (block.open(name, 0, row) for name, row in rows)
        factors = block.of_tensors(statistics[: Row.FEATURES], v.scalars[4:8])
        averaging, per_offset = factors[Row.AVERAGING : Row.FEATURES].split(1)
        a, g = self._directions(block, factors, momentum, square)
        block.write("momentum", 0, momentum)
        block.write("square", 0, square)
        torch.abs(a, out=v.features[2:3])
        torch.mul(offset, per_offset, out=v.features[3:4])
        shared = v.features[_COORDINATE_FEATURES:]
        shared.copy_(block.of_tensors(statistics[Row.FEATURES :], shared))
        if self._lstm is not None:
            self._lstm.run(block)
        out = torch.mm(self._readout, v.top, out=v.out).addmm_(self._readout_of_features, v.features)
        step, mix, weight = out[:1], out[1:3], out[3:]
        step.mul_(config.log_step_gain / config.log_step_bound).tanh_().mul_(config.log_step_bound).exp_()
        mix.div_(config.mix_bound).tanh_().mul_(config.mix_bound)
        weight.div_(config.log_averaging_bound).tanh_().mul_(config.log_averaging_bound).exp_()
        weight.mul_(averaging).clamp_(max=1.0)
        mix[:1].add_(1.0).mul_(g).addcmul_(mix[1:], a)
        move = step.mul_(mix[:1]).mul_(config.nominal_step)
        # What the average takes of the offset goes to the parameters, and what is left stays.
        offset.sub_(move, alpha=config.interpolation)
        delta = torch.mul(weight, offset, out=mix[:1])
        block.write("offset", 0, offset.mul_(weight.neg_().add_(1.0)))
        return delta.sub_(move, alpha=1.0 - config.interpolation)

    def _directions(
        self, block: blocked.Block, corrections: Tensor, momentum: Tensor, square: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advance the moments; the momentum and the gradient over the running RMS, the first two features."""
        v = block.views
        return adam_directions(v.grad, corrections, (momentum, square), self._config, v.features[:2], v.scalars[8:])
