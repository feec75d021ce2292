"""Episodes: those that are under way in training, and those of validation."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from learnedopt.meta.backends import computed
from learnedopt.meta.config import MetaTrainConfig
from learnedopt.meta.estimators import Estimator
from learnedopt.meta.memory import copies_that_fit
from learnedopt.meta.objectives import meta_losses
from learnedopt.meta.ranks import Ranks
from learnedopt.meta.unroll import Episode, start_episode, unroll
from learnedopt.rules import UpdateRule
from learnedopt.runs import OtherRunError
from learnedopt.tasks.base import Task, TaskFamily

_SAVED = ("theta", "loss", "grad", "initial_loss")
_TRAINING, _VALIDATION = 0, 1


@dataclass
class Slot:
    """One running episode, with what is needed to draw its task again when a run is resumed."""

    serial: int
    """Which of all episodes this is; its random numbers follow from it and the run's seed alone."""
    horizon: int
    imitates: bool
    generator: Generator
    episode: Episode


class Pool:
    """The episodes under way, served in turn. Each process has its share of them.

    Args:
        rule: What runs them.
        family: Where tasks are drawn from.
        config: How to train.
        ranks: The processes that share them.

    Raises:
        ValueError: ``episodes`` or ``pool`` are not multiples of the number of processes.
    """

    def __init__(self, rule: UpdateRule, family: TaskFamily, config: MetaTrainConfig, ranks: Ranks) -> None:
        self._rule, self._family, self._config, self._ranks = rule, family, config, ranks
        self._size = max(config.pool, config.episodes)
        for name, count in (("episodes", config.episodes), ("pool", self._size)):
            if count % ranks.size:
                raise ValueError(
                    f"{ranks.size} processes share the episodes: {name} must be a multiple of that, got {count}"
                )
        self.slots: dict[int, Slot] = {}
        """By their places in the pool, those of this process."""
        self.copies = config.copies if config.copies != "auto" else self._copies_that_fit()
        """Copies of each task's structure."""

    def due(self, update: int) -> list[int]:
        """The places whose episodes an update takes a window of."""
        episodes = self._config.episodes
        return [(update * episodes + offset) % self._size for offset in self._ranks.mine(episodes)]

    def next(self, place: int, update: int, stage: int) -> Slot:
        """Start the next episode at a place."""
        serial = self.slots[place].serial + self._size if place in self.slots else place
        self.slots[place] = slot = self.start(serial, update, stage)
        return slot

    def start(
        self, serial: int, update: int, stage: int, horizon: int | None = None, imitates: bool | None = None
    ) -> Slot:
        """An episode from its number and when it begins; what depends on when it began as well can be given."""
        generator = _seeded(self._config.seed, _TRAINING, serial)
        task = self.draw(generator)
        drawn = self.horizon(generator, update, stage), self._imitates(generator, update)
        horizon = drawn[0] if horizon is None else horizon
        imitates = drawn[1] if imitates is None else imitates
        episode = self.estimator(imitates).start(self._rule, task, generator)
        return Slot(serial, horizon, imitates, generator, episode)

    def draw(self, generator: Generator) -> Task:
        """A task."""
        return self._family.draw(generator, self.copies)

    def estimator(self, imitates: bool) -> Estimator:
        """What gives the meta-gradient of an episode."""
        imitation = self._config.imitation if imitates else None
        return self._config.estimator if imitation is None else imitation

    def horizon(self, generator: Generator, update: int, stage: int) -> int:
        """The inner steps of an episode, in whole windows."""
        window = self._config.unroll_length
        low, high = self._config.horizons(update, stage)
        uniform = torch.rand((), generator=generator).item()
        length = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
        return window * max(1, round(length / window))

    def _imitates(self, generator: Generator, update: int) -> bool:
        drawn = torch.rand((), generator=generator).item()
        imitation = self._config.imitation
        return imitation is not None and imitation.takes(drawn, update)

    def state_dict(self) -> dict[str, Any]:
        """The episodes of all processes, for which all must call this."""
        slots = [
            {
                "index": place,
                "serial": slot.serial,
                "horizon": slot.horizon,
                "imitates": slot.imitates,
                "generator": slot.generator.get_state(),
                "step": slot.episode.step,
                "state": _moved(slot.episode.state, "cpu"),
                "memory": _moved(slot.episode.memory, "cpu"),
                **{name: getattr(slot.episode, name).cpu() for name in _SAVED},
            }
            for place, slot in self.slots.items()
        ]
        return {"slots": sorted(self._ranks.collect(slots), key=lambda slot: slot["index"]), "copies": self.copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over this process's share. Raises :class:`OtherRunError` where tasks now have other shapes."""
        self.copies = state["copies"]
        self.slots = {}
        for saved in state["slots"]:
            if saved["index"] % self._ranks.size != self._ranks.rank:
                continue
            slot = self.start(saved["serial"], 0, 0, saved["horizon"], saved["imitates"])
            template = slot.episode
            if saved["theta"].shape != template.theta.shape:
                raise OtherRunError(
                    f"the checkpoint has an episode of shape {tuple(saved['theta'].shape)} where the family now "
                    f"draws {template.flat.task!r}, of shape {tuple(template.theta.shape)}: the tasks have changed, "
                    "start anew"
                )
            device = template.theta.device
            slot.episode = Episode(
                template.flat,
                state=_moved(saved["state"], device),
                memory=_moved(saved["memory"], device),
                step=saved["step"],
                **_moved({name: saved[name] for name in _SAVED}, device),
            )
            slot.generator.set_state(saved["generator"])
            self.slots[saved["index"]] = slot

    def _copies_that_fit(self) -> int:
        """As many as the process with the least memory has room for."""
        return min(self._ranks.collect([copies_that_fit(self._rule, self._family, self._config)]))


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
                generator = _seeded(config.seed, _VALIDATION, index)
                task = self._family.draw(generator, config.validation_copies)
                episode = start_episode(rule, task, generator)
                losses, _ = unroll(rule, episode, horizon, generator, split=config.split)
                tail = losses[-max(1, horizon // 10) :]
                score = meta_losses(tail, episode.initial_loss, config.objective).mean().item()
                scores.append(score if math.isfinite(score) else math.inf)
        scores = self._ranks.collect(scores)
        return sum(scores) / len(scores)


def _seeded(*key: int) -> Generator:
    """A generator for one purpose: streams of different keys have nothing to do with each other."""
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _moved(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}
