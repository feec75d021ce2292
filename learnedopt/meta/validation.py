"""Judging a rule while it is trained."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from learnedopt.meta.backends import computed
from learnedopt.meta.config import MetaTrainConfig
from learnedopt.meta.objectives import meta_losses
from learnedopt.meta.pool import VALIDATION, seeded
from learnedopt.meta.ranks import Ranks
from learnedopt.meta.unroll import start_episode, unroll
from learnedopt.rules import UpdateRule
from learnedopt.tasks.base import TaskFamily


class Validation:
    """A rule of its own that takes given weights and runs on fixed fresh tasks, whose seeds are not those of training.

    Args:
        rule: What is trained; it is copied.
        family: Where tasks are drawn from.
        config: How many of them, and what their losses count.
        ranks: The processes that share them.
    """

    def __init__(self, rule: UpdateRule, family: TaskFamily, config: MetaTrainConfig, ranks: Ranks) -> None:
        self._family, self._config, self._ranks = family, config, ranks
        self._rule = copy.deepcopy(rule)
        self._computed, _ = computed(self._rule, config)

    def score(self, weights: dict[str, Tensor], horizon: int) -> float:
        """Mean over the tasks of the final loss: the last tenth of the steps, in the meta-objective."""
        config, rule = self._config, self._computed
        self._rule.load_state_dict(weights)
        scores = []
        with torch.no_grad():
            for index in self._ranks.mine(config.validation_episodes):
                generator = seeded(config.seed, VALIDATION, index)
                task = self._family.draw(generator, config.validation_copies)
                episode = start_episode(rule, task, generator)
                losses, _ = unroll(rule, episode, horizon, generator, split=config.split)
                tail = losses[-max(1, horizon // 10) :]
                score = meta_losses(tail, episode.initial_loss, config.objective).mean().item()
                scores.append(score if math.isfinite(score) else math.inf)
        scores = self._ranks.collect(scores)
        return sum(scores) / len(scores)
