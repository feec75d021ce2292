""":class:`~learnedopt.rules.AdamLSTMRule` in place on blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from learnedopt.kernels.core import blocked
from learnedopt.kernels.core.base import Tensors
from learnedopt.kernels.core.blocked_lstm import Layers, with_bias
from learnedopt.kernels.core.means import statistics_from_sums
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import AdamLSTMRule, State, UpdateRule
from learnedopt.rules.adam_lstm import Mean, Row

_MOMENTS = ("fast", "slow", "square")


class Program(blocked.Program):
    """``scalars`` has the moments, their corrections and the running RMS."""

    def __init__(self, rule: AdamLSTMRule) -> None:
        hidden, layers = rule.config.hidden_size, rule.config.num_layers
        super().__init__(rule, Sizes(9, outputs=3, scalars=7, hidden=hidden, layers=layers))
        self._config = rule.config
        self._lstm = Layers(rule.lstm)
        self._readout = with_bias(rule.readout)

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        assert isinstance(rule, AdamLSTMRule)

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(len(Mean), corrections.shape[1])
            for block in self.blocks(tensors):
                v = block.views
                moments = v.scalars[:3].split(1)  # not the state's own: it has not moved yet
                for name, row in zip(_MOMENTS, moments):
                    block.read(name, 0, row)
                a, b, g = self._directions(block, corrections, moments)
                factors = {Mean.PARAM_SQUARE: (v.param, v.param), Mean.FAST_GRAD: (a, g), Mean.SLOW_SQUARE: (b, b)}
                for mean, (left, right) in factors.items():
                    torch.mul(left, right, out=v.out[mean : mean + 1])
                block.add_to(v.out, totals)
            return totals

        return statistics_from_sums(rule, tensors, sums)

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        v, config = block.views, self._config
        moments = [block.open(name, 0, row) for name, row in zip(_MOMENTS, v.scalars[:3].split(1))]
        a, b, _ = self._directions(block, statistics, moments)
        for name, row in zip(_MOMENTS, moments):
            block.write(name, 0, row)
        torch.abs(v.features[:2], out=v.features[3:5])
        shared = v.features[5:]
        shared.copy_(block.of_tensors(statistics[Row.FEATURES :], shared))
        self._lstm.run(block)
        out = torch.mm(self._readout, v.top, out=v.out)
        step, mix = out[:1], out[1:]
        step.mul_(config.log_step_gain / config.log_step_bound).tanh_().mul_(config.log_step_bound).exp_()
        mix.div_(config.mix_bound).tanh_().mul_(config.mix_bound)
        mix[:1].add_(1.0).mul_(a).addcmul_(mix[1:], b)
        return step.mul_(mix[:1]).mul_(-config.nominal_step)

    def _directions(self, block: blocked.Block, statistics: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
        """Advance the moments; both momenta and the gradient over the running RMS, the first three features."""
        v, config = block.views, self._config
        limits = torch.finfo(v.grad.dtype)
        limit = 0.5 * math.sqrt(limits.max)
        grad = v.grad.clamp_(-limit, limit)
        fast, slow, square = moments
        torch.lerp(grad, fast, config.fast_decay, out=fast)
        torch.lerp(grad, slow, config.slow_decay, out=slow)
        rms = v.scalars[6:]
        torch.lerp(torch.mul(grad, grad, out=rms), square, config.square_decay, out=square)
        corrections = block.of_tensors(statistics[: Row.FEATURES], v.scalars[3:6]).split(1)
        torch.mul(square, corrections[Row.SQUARE_CORRECTION], out=rms).clamp_(min=limits.tiny).sqrt_().add_(config.eps)
        directions = list(v.features[:3].split(1))
        for moment, correction, direction in zip((fast, slow), corrections, directions):
            torch.mul(moment, correction, out=direction).div_(rms)
        torch.div(grad, rms, out=directions[2])
        return directions
