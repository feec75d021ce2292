"""What the ways of meta-training have in common."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from learnedopt.meta.ranks import Ranks
from learnedopt.rules import RuleConfig, UpdateRule, build_rule
from learnedopt.runs import Trainable


class Settings(Protocol):
    """How a rule is trained."""

    @property
    def updates(self) -> int:
        """How many there are to be."""

    @property
    def seed(self) -> int:
        """What everything random follows from."""

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""


C = TypeVar("C", bound=Settings)


class RuleTrainer(Trainable, Generic[C]):
    """What trains a rule, in one process or in several."""

    unit: ClassVar[str] = "update"
    loss: ClassVar[str] = "meta_loss"

    def __init__(self, rule: RuleConfig | UpdateRule, config: C, device: torch.device | str) -> None:
        self.config = config
        self.ranks = Ranks()
        self.rule = initial_rule(rule, config.seed).to(device)
        self.update = 0
        self.best_score = math.inf

    @property
    @abstractmethod
    def backend(self) -> str:
        """What computes the rule."""

    @property
    @abstractmethod
    def copies(self) -> int:
        """Copies of each task's structure."""

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


def initial_rule(rule: RuleConfig | UpdateRule, seed: int) -> UpdateRule:
    """What training begins with: a rule with weights drawn from the seed, or a copy of the one given."""
    if isinstance(rule, UpdateRule):
        return copy.deepcopy(rule).train().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_rule(rule)
