"""Meta-training by truncated backpropagation through time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from learnedopt.meta.objectives import OBJECTIVES
from learnedopt.meta.unroll import Episode, start_episode, unroll
from learnedopt.rules import RuleConfig, UpdateRule, build_rule
from learnedopt.tasks.base import Task, TaskFamily


class MetaTrainingError(RuntimeError):
    """Meta-training cannot go on; the message says why and on which task."""


@dataclass(frozen=True)
class MetaTrainConfig:
    """How a rule is trained. One *update* is one outer-optimizer step on one window of every running episode."""

    updates: int
    unroll_length: int = 20
    """Truncation window: inner steps between outer updates, and how far the meta-gradient reaches back."""
    horizon: tuple[int, int] = (100, 100)
    """Inner steps of an episode, log-uniform in this range, rounded to whole windows."""
    curriculum_updates: int = 0
    """The longest horizon grows linearly from the shortest to its full length over this many updates; 0 for none."""
    episodes: int = 1
    """Windows per update, each of another episode with its own task structure; their meta-gradients are averaged."""
    pool: int = 1
    """Episodes under way (at least ``episodes``), served in turn: successive updates see different tasks."""
    copies: int = 1
    """Copies of each structure: initialisations and data of their own."""
    objective: str = "mean"
    """Name in :data:`~learnedopt.meta.objectives.OBJECTIVES`."""
    second_order: bool = False
    learning_rate: float = 1e-3
    """Adam's, for the meta-parameters; it falls to ``final_learning_rate`` along a half cosine."""
    final_learning_rate: float = 1e-3
    clip_norm: float | None = None
    """Largest norm of the meta-gradient; longer ones are scaled down."""
    validate_every: int = 500
    validation_episodes: int = 1
    validation_copies: int = 20
    validation_horizon: int = 100
    patience: int | None = None
    """Stop after this many validations without a better one; ``None`` trains to the end. The best is kept anyway."""
    max_skipped: int = 100
    """Windows with a non-finite meta-loss or meta-gradient are skipped; more than this many stop the run."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("updates", "unroll_length", "episodes", "pool", "copies", "validate_every")
        for name in (*positive, "validation_episodes", "validation_copies", "validation_horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.horizon[0] <= self.horizon[1]:
            raise ValueError(f"horizon must be (shortest, longest) with 1 <= shortest <= longest, got {self.horizon}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; known: {sorted(OBJECTIVES)}")
        if not (self.learning_rate > 0 and self.final_learning_rate >= 0):
            raise ValueError("learning_rate must be positive and final_learning_rate not negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for none, got {self.clip_norm}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, or None for no early stopping, got {self.patience}")


@dataclass
class _Slot:
    """One running episode, with what is needed to draw its task again when a run is resumed."""

    drawn_from: Tensor
    """The generator's state before the task was drawn."""
    horizon: int
    episode: Episode


class MetaTrainer:
    """Trains a rule on a family of tasks; deterministic, and resumable bit for bit.

    Truncated backpropagation through time: an episode is cut into windows; each window starts from constants, so
    the meta-gradient sees effects up to ``unroll_length`` steps away and is biased towards rules that pay off within
    that many steps (Wu et al. 2018, arXiv:1803.02021). Every ``validate_every`` updates the rule is frozen and run
    on a fixed set of fresh tasks; the best rule so far by their *final* loss is kept (Andrychowicz et al. 2016,
    section 3).

    Args:
        rule: Configuration of the rule to train.
        family: Where tasks are drawn from.
        config: How to train.
        device: Where rule and optimizees live. Tasks and batches are drawn on the CPU and follow.

    >>> from learnedopt.rules import LSTMConfig
    >>> from learnedopt.tasks import Quadratics
    >>> config = MetaTrainConfig(updates=2, unroll_length=5, horizon=(10, 10), validate_every=2)
    >>> trainer = MetaTrainer(LSTMConfig(hidden_size=4), Quadratics(), config)
    >>> [record["update"] for record in trainer.run()]
    [1, 2]
    """

    def __init__(
        self, rule: RuleConfig, family: TaskFamily, config: MetaTrainConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.family = family
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.rule = build_rule(rule).to(device)
        self.outer = torch.optim.Adam(self.rule.parameters(), lr=config.learning_rate)
        self.generator = Generator().manual_seed(config.seed)
        self.update = 0
        self.skipped = 0
        self.seconds = 0.0
        self.best_score = math.inf
        self.best_update = 0
        self.best_weights = self._weights()
        self._slots: list[_Slot] = []

    @property
    def finished(self) -> bool:
        """Whether all updates are done, or patience has run out."""
        return self.update >= self.config.updates or self._out_of_patience()

    def run(self, time_limit: float = math.inf) -> Iterator[dict[str, Any]]:
        """Train on from where this trainer stands, yielding one record per update.

        A record holds ``update``, ``meta_loss``, ``grad_norm``, ``learning_rate``, ``seconds`` (of training so far,
        over all sittings) and, after a validation, ``validation`` and ``best``.

        Args:
            time_limit: Stop cleanly after the update during which this many seconds have passed.

        Raises:
            MetaTrainingError: more than ``max_skipped`` windows were not finite.
        """
        started, before = time.perf_counter(), self.seconds
        while not self.finished:
            record = self._step()
            if self.update % self.config.validate_every == 0 or self.update == self.config.updates:
                score = self.validate()
                if score < self.best_score:
                    self.best_score, self.best_update, self.best_weights = score, self.update, self._weights()
                record.update(validation=score, best=self.best_score)
            elapsed = time.perf_counter() - started
            self.seconds = before + elapsed
            yield record | {"seconds": self.seconds}
            if elapsed > time_limit:
                return

    def best_rule(self) -> UpdateRule:
        """The rule with the weights of the best validation so far."""
        rule = copy.deepcopy(self.rule)
        rule.load_state_dict(self.best_weights)
        return rule

    def validate(self) -> float:
        """Mean over fixed validation tasks of the final loss: the last tenth of the steps, in the meta-objective.

        The tasks are drawn from a seed of their own: the same at every call, and not those of training.
        """
        config = self.config
        generator = Generator().manual_seed(config.seed + 0x5EED)
        objective = OBJECTIVES[config.objective]
        scores = []
        with torch.no_grad():
            for _ in range(config.validation_episodes):
                task = self.family.draw(generator, config.validation_copies)
                episode = start_episode(self.rule, task, generator)
                losses, _ = unroll(self.rule, episode, config.validation_horizon, generator)
                tail = max(1, config.validation_horizon // 10)
                score = objective(losses[-tail:], episode.initial_loss).item()
                scores.append(score if math.isfinite(score) else math.inf)
        return sum(scores) / len(scores)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: weights, outer optimizer, generator, running episodes, best so far."""
        return {
            "config": asdict(self.config),
            "rule_config": self.rule.config.to_dict(),
            "rule": self.rule.state_dict(),
            "outer": self.outer.state_dict(),
            "generator": self.generator.get_state(),
            "update": self.update,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "best_score": self.best_score,
            "best_update": self.best_update,
            "best_weights": self.best_weights,
            "slots": [
                {
                    "drawn_from": slot.drawn_from,
                    "horizon": slot.horizon,
                    "step": slot.episode.step,
                    "state": slot.episode.state,
                    **{name: getattr(slot.episode, name) for name in ("theta", "loss", "grad", "initial_loss")},
                }
                for slot in self._slots
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from :meth:`state_dict`.

        Raises:
            ValueError: it was made with another configuration, or on tasks of other shapes.
        """
        if state["rule_config"] != self.rule.config.to_dict():
            raise ValueError(f"the checkpoint trains {state['rule_config']}, this run {self.rule.config.to_dict()}")
        ours = asdict(self.config)
        if different := sorted(name for name in ours if state["config"].get(name) != ours[name]):
            raise ValueError(
                f"the checkpoint was made with other settings: {different}; continue it with the same, or start anew"
            )
        self.rule.load_state_dict(state["rule"])
        self.outer.load_state_dict(state["outer"])
        for name in ("update", "skipped", "seconds", "best_score", "best_update", "best_weights"):
            setattr(self, name, state[name])
        self._slots = []
        for saved in state["slots"]:
            self.generator.set_state(saved["drawn_from"])
            task = self._draw()
            template = start_episode(self.rule, task, self.generator)
            if saved["theta"].shape != template.theta.shape:
                raise ValueError(
                    f"the checkpoint has an episode of shape {tuple(saved['theta'].shape)} where the family now draws "
                    f"{task!r}, of shape {tuple(template.theta.shape)}: the tasks have changed, start anew"
                )
            device = template.theta.device
            tensors = {name: saved[name].to(device) for name in ("theta", "loss", "grad", "initial_loss")}
            memory = {name: value.to(device) for name, value in saved["state"].items()}
            episode = Episode(template.flat, state=memory, step=saved["step"], **tensors)
            self._slots.append(_Slot(saved["drawn_from"], saved["horizon"], episode))
        self.generator.set_state(state["generator"])

    def _step(self) -> dict[str, Any]:
        config = self.config
        pool = max(config.pool, config.episodes)
        turn = [(self.update * config.episodes + offset) % pool for offset in range(config.episodes)]
        for group in self.outer.param_groups:
            group["lr"] = learning_rate = self._learning_rate()
        self.outer.zero_grad()
        meta_losses, tasks = [], []
        for index in turn:
            if index == len(self._slots):
                self._slots.append(self._start())
            slot = self._slots[index]
            losses, episode = unroll(
                self.rule, slot.episode, config.unroll_length, self.generator, second_order=config.second_order
            )
            meta_loss = OBJECTIVES[config.objective](losses, episode.initial_loss)
            if torch.isfinite(meta_loss):
                (meta_loss / config.episodes).backward()
                slot.episode = episode
            meta_losses.append(meta_loss.item())
            tasks.append(repr(episode.flat.task))
            if not math.isfinite(meta_losses[-1]) or episode.step >= slot.horizon:
                self._slots[index] = self._start()
        parameters = list(self.rule.parameters())
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if math.isfinite(sum(meta_losses)) and torch.isfinite(grad_norm):
            if config.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, grad_norm)
            self.outer.step()
        else:
            self.skipped += 1
            if self.skipped > config.max_skipped:
                raise MetaTrainingError(
                    f"{self.skipped} windows had a non-finite meta-loss or meta-gradient, the last at update "
                    f"{self.update} on {', '.join(tasks)}; lower the learning rate, clip the gradient, or shorten the "
                    f"horizon"
                )
        self.update += 1
        return {
            "update": self.update,
            "meta_loss": sum(meta_losses) / len(meta_losses),
            "grad_norm": grad_norm.item(),
            "learning_rate": learning_rate,
        }

    def _start(self) -> _Slot:
        drawn_from = self.generator.get_state()
        task = self._draw()
        horizon = self._horizon()
        return _Slot(drawn_from, horizon, start_episode(self.rule, task, self.generator))

    def _draw(self) -> Task:
        return self.family.draw(self.generator, self.config.copies)

    def _horizon(self) -> int:
        config = self.config
        low, longest = config.horizon
        grown = min(1.0, self.update / config.curriculum_updates) if config.curriculum_updates else 1.0
        high = low + grown * (longest - low)
        uniform = torch.rand((), generator=self.generator).item()
        length = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
        return config.unroll_length * max(1, round(length / config.unroll_length))

    def _learning_rate(self) -> float:
        config = self.config
        remaining = 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.update / config.updates)))
        return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * remaining

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.update - self.best_update >= patience * self.config.validate_every

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.rule.state_dict().items()}
