"""What the ways of meta-training have in common."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch

from learnedopt.meta.config import MetaTrainConfig, SearchConfig
from learnedopt.meta.ranks import Ranks
from learnedopt.rules import RuleConfig, UpdateRule, build_rule
from learnedopt.runs import Trainable

C = TypeVar("C", MetaTrainConfig, SearchConfig)


class RuleTrainer(Trainable, Generic[C]):
    """What trains a rule, in one process or in several: one with weights drawn from the seed, or a copy of one."""

    unit: ClassVar[str] = "update"
    loss: ClassVar[str] = "meta_loss"
    backend: str
    """What computes the rule."""
    copies: int
    """Copies of each task's structure."""

    def __init__(self, rule: RuleConfig | UpdateRule, config: C, device: torch.device | str) -> None:
        self.config: C = config
        self.ranks = Ranks()
        self.update = 0
        self.best_score = math.inf
        if isinstance(rule, UpdateRule):
            self.rule = copy.deepcopy(rule).train().requires_grad_()
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(config.seed)
                self.rule = build_rule(rule)
        self.rule.to(device)

    @abstractmethod
    def best_rule(self) -> UpdateRule:
        """The best that was found so far."""

    @property
    def done(self) -> int:
        return self.update

    @property
    def total(self) -> int:
        return self.config.updates

    @property
    def writes(self) -> bool:
        return self.ranks.rank == 0

    def settings(self) -> dict[str, Any]:
        return {
            "rule": self.rule.config.to_dict(),
            "training": self.config.to_dict(),
            "copies": self.copies,
            "backend": self.backend,
            "processes": self.ranks.size,
        }
