"""The outer loop of meta-training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from learnedopt.meta.backends import computed
from learnedopt.meta.config import MetaTrainConfig
from learnedopt.meta.estimators import Estimator
from learnedopt.meta.memory import copies_that_fit
from learnedopt.meta.objectives import meta_losses
from learnedopt.meta.ranks import Ranks
from learnedopt.meta.unroll import Episode, start_episode, unroll
from learnedopt.rules import RuleConfig, UpdateRule, build_rule
from learnedopt.tasks.base import Task, TaskFamily


class MetaTrainingError(RuntimeError):
    """Meta-training cannot go on; the message says why and on which task."""


@dataclass
class _Slot:
    """One running episode, with what is needed to draw its task again when a run is resumed."""

    serial: int
    """Which of all episodes this is; its random numbers follow from it and the run's seed alone."""
    horizon: int
    imitates: bool
    generator: Generator
    episode: Episode


_SAVED = ("theta", "loss", "grad", "initial_loss")


def initial_rule(rule: RuleConfig | UpdateRule, seed: int) -> UpdateRule:
    """What training begins with: a rule with weights drawn from the seed, or a copy of the one given."""
    if isinstance(rule, UpdateRule):
        return copy.deepcopy(rule).train().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_rule(rule)


class MetaTrainer:
    """Trains a rule on a family of tasks; deterministic, and resumable bit for bit.

    An episode is cut into windows; each gives one estimate of the meta-gradient (``config.estimator``), and Adam
    follows their average. Every ``validate_every`` updates the rule is frozen and run on a fixed set of fresh tasks;
    the best rule so far by their *final* loss is kept (Andrychowicz et al. 2016, section 3).

    Where processes train together (``torch.distributed``), each runs its share of the ``episodes`` of an update, and
    all get all estimates. An episode has random numbers of its own and estimates are averaged in a fixed order, so
    the result does not depend on the number of processes, bit for bit; a run may change it when it is resumed. Every
    process makes the same calls.

    Args:
        rule: Configuration of the rule to train; or a rule, of which a copy is trained on from its weights. These are
            validated first, and kept if training finds none that are better.
        family: Where tasks are drawn from.
        config: How to train.
        device: Where rule and optimizees live. Tasks and batches are drawn on the CPU and follow.

    Raises:
        ValueError: ``episodes`` or ``pool`` are not multiples of the number of processes.
        RuntimeError: ``config.backend`` is ``"native"``, which this machine or the rule does not have.

    >>> from learnedopt.rules import LSTMConfig
    >>> from learnedopt.tasks import Quadratics
    >>> config = MetaTrainConfig(updates=2, unroll_length=5, horizon=(10, 10), validate_every=2)
    >>> trainer = MetaTrainer(LSTMConfig(hidden_size=4), Quadratics(), config)
    >>> [record["update"] for record in trainer.run()]
    [1, 2]
    """

    def __init__(
        self,
        rule: RuleConfig | UpdateRule,
        family: TaskFamily,
        config: MetaTrainConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.family = family
        self.ranks = Ranks()
        self._pool = max(config.pool, config.episodes)
        for name, count in (("episodes", config.episodes), ("pool", self._pool)):
            if count % self.ranks.size:
                raise ValueError(
                    f"{self.ranks.size} processes share the episodes: {name} must be a multiple of that, got {count}"
                )
        self._goes_on = isinstance(rule, UpdateRule)
        self.rule = initial_rule(rule, config.seed).to(device)
        self.outer = torch.optim.Adam(self.rule.parameters(), lr=config.learning_rate)
        self.average = (
            None
            if config.ema_decay is None
            else AveragedModel(self.rule, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        )
        # Shares its parameters with the rule, so that gradients and updates are the rule's own.
        self._computed, self.backend = computed(self.rule, config)
        self._validated = copy.deepcopy(self.rule)
        self._validated_as, _ = computed(self._validated, config)
        self.update = 0
        self.stage = 0
        self.skipped = 0
        self.seconds = 0.0
        self.best_score = math.inf
        self.best_update = 0
        self._last_better = 0
        self.best_weights = self._weights()
        self._slots: dict[int, _Slot] = {}
        self.copies = self._agreed_copies() if config.copies == "auto" else config.copies

    @property
    def finished(self) -> bool:
        """Whether all updates are done, or patience has run out."""
        return self.update >= self.config.updates or (self._out_of_patience() and self._last_stage())

    def run(self, time_limit: float = math.inf, stop: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
        """Train on from where this trainer stands, yielding one record per update.

        A record holds ``update``, ``meta_loss`` (the mean over the windows that were finite), ``grad_norm``,
        ``learning_rate``, ``steps`` (inner steps, counted once per copy), ``seconds`` (of training so far, over all
        sittings); after a validation, ``validation`` and ``best``; where windows were skipped, ``skipped``, their
        tasks; and with a staged curriculum, ``stage``.

        Args:
            time_limit: Stop cleanly after the update during which this many seconds have passed.
            stop: Asked once in every update; stop cleanly after the one where it says so. Where processes train
                together, all stop when one of them is to.

        Raises:
            MetaTrainingError: more than ``max_skipped`` windows were not finite.
        """
        started, before = time.perf_counter(), self.seconds
        asked = False
        if self._goes_on and self.update == 0:
            self._judge()
        while not (self.finished or asked):
            record, asked = self._step(lambda: stop() or time.perf_counter() - started > time_limit)
            if self.update % self.config.validate_every == 0 or self.update == self.config.updates:
                record |= self._judge()
            self.seconds = before + time.perf_counter() - started
            yield record | {"seconds": self.seconds}

    def best_rule(self) -> UpdateRule:
        """The rule with the weights of the best validation so far."""
        rule = copy.deepcopy(self.rule)
        rule.load_state_dict(self.best_weights)
        return rule

    def validate(self) -> float:
        """Mean over fixed validation tasks of the final loss: the last tenth of the steps, in the meta-objective.

        The tasks are drawn from seeds of their own: the same at every call, and not those of training.
        """
        config = self.config
        horizon = self._validation_horizon()
        self._validated.load_state_dict(self._weights())
        rule = self._validated_as
        scores = []
        with torch.no_grad():
            for index in self.ranks.mine(config.validation_episodes):
                generator = _generator(config.seed, _VALIDATION, index)
                task = self.family.draw(generator, config.validation_copies)
                episode = start_episode(rule, task, generator)
                losses, _ = unroll(rule, episode, horizon, generator, split=config.split)
                tail = losses[-max(1, horizon // 10) :]
                score = meta_losses(tail, episode.initial_loss, config.objective).mean().item()
                scores.append(score if math.isfinite(score) else math.inf)
        scores = self.ranks.collect(scores)
        return sum(scores) / len(scores)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: weights, outer optimizer, running episodes, generators, best so far.

        Where processes train together, all must call this, and all get the whole.
        """
        slots = [
            {
                "index": index,
                "serial": slot.serial,
                "horizon": slot.horizon,
                "imitates": slot.imitates,
                "generator": slot.generator.get_state(),
                "step": slot.episode.step,
                "state": _to_cpu(slot.episode.state),
                "memory": _to_cpu(slot.episode.memory),
                **{name: getattr(slot.episode, name).cpu() for name in _SAVED},
            }
            for index, slot in self._slots.items()
        ]
        return {
            "config": self.config.to_dict(),
            "rule_config": self.rule.config.to_dict(),
            "rule": self.rule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "outer": self.outer.state_dict(),
            "slots": sorted(self.ranks.collect(slots), key=lambda slot: slot["index"]),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from :meth:`state_dict`.

        Raises:
            ValueError: it was made with another configuration, or on tasks of other shapes.
        """
        if state["rule_config"] != self.rule.config.to_dict():
            raise ValueError(f"the checkpoint trains {state['rule_config']}, this run {self.rule.config.to_dict()}")
        ours = self.config.to_dict()
        if different := sorted(name for name in ours if state["config"].get(name) != ours[name]):
            raise ValueError(
                f"the checkpoint was made with other settings: {different}; continue it with the same, or start anew"
            )
        self.rule.load_state_dict(state["rule"])
        self.outer.load_state_dict(state["outer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self._slots = {}
        for saved in state["slots"]:
            if saved["index"] % self.ranks.size != self.ranks.rank:
                continue
            slot = self._start(saved["serial"], saved["horizon"], saved["imitates"])
            template = slot.episode
            if saved["theta"].shape != template.theta.shape:
                raise ValueError(
                    f"the checkpoint has an episode of shape {tuple(saved['theta'].shape)} where the family now "
                    f"draws {template.flat.task!r}, of shape {tuple(template.theta.shape)}: the tasks have changed, "
                    "start anew"
                )
            device = template.theta.device
            slot.episode = Episode(
                template.flat,
                state={name: value.to(device) for name, value in saved["state"].items()},
                memory={name: value.to(device) for name, value in saved["memory"].items()},
                step=saved["step"],
                **{name: saved[name].to(device) for name in _SAVED},
            )
            slot.generator.set_state(saved["generator"])
            self._slots[saved["index"]] = slot

    def _step(self, stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """One update: its record, and whether any process is to stop after it."""
        config = self.config
        for group in self.outer.param_groups:
            group["lr"] = learning_rate = self._learning_rate()
        rows, tasks, steps = [], [], 0
        for offset in self.ranks.mine(config.episodes):
            index = (self.update * config.episodes + offset) % self._pool
            slot = self._slots.get(index) or self._next(index)
            estimator = self._estimator(slot.imitates)
            length = estimator.steps(config.unroll_length, slot.horizon)
            torch.compiler.cudagraph_mark_step_begin()  # the memory of captured windows before may be used again
            estimate, slot.episode = estimator.estimate(
                self._computed, slot.episode, length, slot.generator, config.meta_objective
            )
            rows.append(torch.cat([estimate.gradient, estimate.meta_loss.reshape(1)]))
            tasks.append(repr(slot.episode.flat.task))
            steps += length * len(slot.episode.theta)
            if not torch.isfinite(estimate.meta_loss) or slot.episode.step >= slot.horizon:
                self._next(index)
        flags = rows[0].new_full((len(rows), 1), float(stop()))
        everything = self.ranks.gather(torch.cat([torch.stack(rows), flags], dim=1))
        everything, asked = everything[:, :-1], bool(everything[:, -1].any())
        finite = everything.isfinite().all(1)
        record: dict[str, Any] = {"update": self.update + 1}
        if not finite.all():
            record["skipped"] = self._skip(finite.tolist(), tasks)
        mean = everything[finite].mean(0)
        gradient, meta_loss = mean[:-1], mean[-1].item()
        grad_norm = gradient.norm().item()
        if finite.any():
            self._follow(gradient, grad_norm)
        self.update += 1
        record |= {"meta_loss": meta_loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        record |= {"steps": steps * self.ranks.size} | ({"stage": self.stage} if config.stages else {})
        return record, asked

    def _follow(self, gradient: Tensor, norm: float) -> None:
        """One step of the outer optimizer."""
        if self.config.clip_norm is not None:
            gradient = gradient * min(1.0, self.config.clip_norm / (norm + 1e-6))
        parameters = list(self.rule.parameters())
        for parameter, part in zip(parameters, gradient.split([parameter.numel() for parameter in parameters])):
            parameter.grad = part.view_as(parameter)
        self.outer.step()
        if self.average is not None:
            self.average.update_parameters(self.rule)

    def _skip(self, finite: list[bool], tasks: list[str]) -> list[str]:
        """The tasks of the windows that were not finite."""
        bad = [task for task, good in zip(self.ranks.collect(tasks), finite) if not good]
        self.skipped += len(bad)
        if self.skipped > self.config.max_skipped:
            raise MetaTrainingError(
                f"{self.skipped} windows had a non-finite meta-loss or meta-gradient, the last at update {self.update} "
                f"on {', '.join(bad)}; lower the learning rate, clip the gradient, or shorten the horizon"
            )
        return bad

    def _judge(self) -> dict[str, Any]:
        """Validate; remember what is best; go on to the next stage of a curriculum when this one gives no more."""
        score = self.validate()
        if score < self.best_score:
            self.best_score, self.best_update, self.best_weights = score, self.update, self._weights()
            self._last_better = self.update
        record = {"validation": score, "best": self.best_score}
        if self._out_of_patience() and not (self._last_stage() or self.update == self.config.updates):
            judged = self._validation_horizon()
            self.stage += 1
            self.rule.load_state_dict(self.best_weights)
            if self.average is not None:
                self.average.module.load_state_dict(self.best_weights)
            # The next stage has to do better than what it begins with. The last has the length of the one before.
            if self._validation_horizon() != judged:
                self.best_score = self.validate()
            self._last_better = self.update
            for index in self._slots:
                self._next(index)
        return record

    def _next(self, index: int) -> _Slot:
        """Start the next episode at a place of the pool."""
        serial = self._slots[index].serial + self._pool if index in self._slots else index
        self._slots[index] = slot = self._start(serial)
        return slot

    def _start(self, serial: int, horizon: int | None = None, imitates: bool | None = None) -> _Slot:
        """An episode from its number; what depends on when it began as well can be given."""
        generator = _generator(self.config.seed, _TRAINING, serial)
        task = self._draw(generator)
        drawn = self._horizon(generator), self._imitates(generator)
        horizon = drawn[0] if horizon is None else horizon
        imitates = drawn[1] if imitates is None else imitates
        episode = self._estimator(imitates).start(self._computed, task, generator)
        return _Slot(serial, horizon, imitates, generator, episode)

    def _draw(self, generator: Generator) -> Task:
        return self.family.draw(generator, self.copies)

    def _estimator(self, imitates: bool) -> Estimator:
        if imitates:
            assert self.config.imitation is not None
            return self.config.imitation
        return self.config.estimator

    def _imitates(self, generator: Generator) -> bool:
        config = self.config
        over = config.imitation_updates is not None and self.update >= config.imitation_updates
        return torch.rand((), generator=generator).item() < config.imitation_share and not over

    def _horizon(self, generator: Generator) -> int:
        config = self.config
        if config.stages:
            low = high = float(config.stages[self.stage])
        else:
            low, longest = config.horizon
            grown = min(1.0, self.update / config.curriculum_updates) if config.curriculum_updates else 1.0
            high = low + grown * (longest - low)
        uniform = torch.rand((), generator=generator).item()
        length = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
        return config.unroll_length * max(1, round(length / config.unroll_length))

    def _validation_horizon(self) -> int:
        stages = self.config.stages
        return stages[min(self.stage + 1, len(stages) - 1)] if stages else self.config.validation_horizon

    def _learning_rate(self) -> float:
        config = self.config
        remaining = 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.update / config.updates)))
        return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * remaining

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.update - self._last_better >= patience * self.config.validate_every

    def _last_stage(self) -> bool:
        return self.stage >= len(self.config.stages) - 1

    def _weights(self) -> dict[str, Tensor]:
        """What is validated and kept: the average, where there is one."""
        rule = self.rule if self.average is None else self.average.module
        return {name: value.detach().to("cpu", copy=True) for name, value in rule.state_dict().items()}

    def _agreed_copies(self) -> int:
        """As many as the process with the least memory has room for."""
        return min(self.ranks.collect([copies_that_fit(self._computed, self.family, self.config)]))


_COUNTERS = (
    "update",
    "stage",
    "skipped",
    "seconds",
    "best_score",
    "best_update",
    "_last_better",
    "best_weights",
    "copies",
)
_TRAINING, _VALIDATION = 0, 1


def _generator(*key: int) -> Generator:
    """A generator for one purpose: streams of different keys have nothing to do with each other."""
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}
