"""The meta-LSTM as the method for few-shot learning that it was made to be."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.evaluate import best_settings
from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners.inner_loop import InnerLoopConfig, InnerLoopLearner, Params, Record, flatten, unflatten
from learnedopt.fewshot.sources import EpisodeList
from learnedopt.kernels.core import extension
from learnedopt.kernels.lstm_training import fused
from learnedopt.rules import MetaLSTMConfig, MetaLSTMRule, Segments

PUBLISHED = MetaLSTMConfig()


@dataclass(frozen=True)
class MetaLSTMLearnerConfig(InnerLoopConfig):
    """Settings of :class:`MetaLSTMLearner`; the defaults are the paper's for 1-shot.

    5-shot: ``steps=5`` in the paper, 8 in the authors' code. Evaluation takes as many updates as training: the LSTM has
    seen no others.
    """

    kind: ClassVar[str] = "meta_lstm"
    built_in: ClassVar[frozenset[str]] = InnerLoopConfig.built_in | {"rule"}
    steps: int = 12
    first_order: bool = True
    """Treat the gradients and losses that the LSTM reads as constants, as published; otherwise their derivatives count
    too (Huisman et al. 2022, arXiv:2104.10527)."""
    rule: MetaLSTMConfig = PUBLISHED
    """The LSTM. Its ``learner_shapes`` must be empty: the network's parameters are the learned initialization."""
    gate_shift: float = 0.0
    """Added in evaluation to the bias of the input gate: below zero steps are smaller than the LSTM has learned, above
    it larger. To be chosen on validation, which :meth:`MetaLSTMLearner.choose_settings` does, as fine-tuning's rate."""
    gate_shifts: tuple[float, ...] = (0.0,)
    """What to choose from; of one alone nothing is chosen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gate_shifts or not all(math.isfinite(shift) for shift in (self.gate_shift, *self.gate_shifts)):
            raise ValueError(f"gate shifts must be finite, at least one, got {self.gate_shift} and {self.gate_shifts}")
        if self.rule.learner_shapes:
            raise ValueError("leave learner_shapes of the rule empty: the network's own shapes are used")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> MetaLSTMLearner:
        return MetaLSTMLearner(self, backbone, shape)


class MetaLSTMLearner(InnerLoopLearner):
    r"""An LSTM, learned together with the initialization, makes the updates.

    The updates are those of :class:`~learnedopt.rules.MetaLSTMRule`, the very object that
    :class:`~learnedopt.optim.MetaLSTMOptimizer` runs, fed with the gradient and the loss of the whole support set; its
    cell's initial state :math:`c_0` is the network's initial parameters. :meth:`export_rule` gives it to the zoo.

    The paper averages the statistics of batch normalization over the updates of an episode, with so large a momentum
    that hardly more than the last support pass remains; ``normalization="support"`` takes those of the support set
    under the final parameters.

    Source: Ravi & Larochelle, "Optimization as a model for few-shot learning", ICLR 2017, sections 3 and 4.

    >>> from learnedopt.fewshot.learner import LearnerShape
    >>> from learnedopt.fewshot.backbones import MLP
    >>> learner = MetaLSTMLearnerConfig(steps=2).build(MLP((4,)), LearnerShape((3,), ways=2))
    >>> learner.fit(torch.eye(2, 3), torch.arange(2)).predict(torch.eye(3)).shape
    torch.Size([3, 2])
    """

    config: MetaLSTMLearnerConfig

    def __init__(self, config: MetaLSTMLearnerConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape)
        self.rule = MetaLSTMRule(config.rule)

    def trajectory(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None = None) -> Iterator[Params]:
        second_order = self.differentiable and not self.config.first_order
        support = self.support(x, record, second_order)
        params = self.initial(len(x), ways)
        theta = flatten(params)
        segments = Segments([value[0].numel() for value in params.values()], copies=len(x))
        state = self.rule.init_state(segments, theta.dtype, theta.device)
        rule = self.rule if self.training or not self.config.gate_shift else self._shifted()
        if theta.device.type == "cpu" and extension.why_unavailable() is None:
            rule = fused(rule)
        for step in range(self.steps):
            loss, grads = self.loss_and_grad(params, step, support, y, ways, second_order, record)
            with torch.set_grad_enabled(self.differentiable):
                delta, state = rule.update(theta.flatten(), flatten(grads).flatten(), state, segments, loss)
                theta = theta + delta.view_as(theta)
                params = unflatten(theta, params)
            yield params

    def choose_settings(self, episodes: Episodes | EpisodeList) -> dict[str, Any]:
        """Take the shift of the input gate that is best on these episodes (the mean accuracy; median error)."""
        if len(self.config.gate_shifts) == 1:
            return {}
        chosen = best_settings(self, ({"gate_shift": shift} for shift in self.config.gate_shifts), episodes)
        self.config = self.with_config(**chosen).config
        return chosen

    def _shifted(self) -> MetaLSTMRule:
        rule = copy.deepcopy(self.rule)
        with torch.no_grad():
            rule.input_gate.bias.add_(self.config.gate_shift)
        return rule

    def export_rule(self) -> MetaLSTMRule:
        """The rule with its learned initialization, a copy: what :func:`learnedopt.zoo.save_rule` writes.

        Parameters that are not adapted are not in it.
        """
        start = [value[0].detach() for value in self.initial(1, self.shape.ways).values()]
        rule = MetaLSTMRule(replace(self.config.rule, learner_shapes=tuple(tuple(value.shape) for value in start)))
        rule = rule.to(start[0])
        rule.load_state_dict(
            {**self._shifted().state_dict(), "c0": torch.cat([value.flatten() for value in start])}, assign=False
        )
        return rule
