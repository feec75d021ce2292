"""The outer loop of meta-training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from learnedopt.meta.backends import computed
from learnedopt.meta.base import RuleTrainer
from learnedopt.meta.config import MetaTrainConfig, Stages, from_flat
from learnedopt.meta.episodes import Pool, Validation
from learnedopt.rules import RuleConfig, UpdateRule
from learnedopt.rules.legacy import modern_training
from learnedopt.runs import OtherRunError, Record, Stop
from learnedopt.tasks.base import TaskFamily


class MetaTrainingError(RuntimeError):
    """Meta-training cannot go on; the message says why and on which task."""


class Outer:
    """Adam over the weights of a rule, and their average where one is kept."""

    def __init__(self, rule: UpdateRule, config: MetaTrainConfig) -> None:
        self.rule = rule
        self.clip_norm = config.clip_norm
        self.adam = torch.optim.Adam(rule.parameters(), lr=config.learning_rate)
        self.average = (
            None
            if config.ema_decay is None
            else AveragedModel(rule, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        )

    def follow(self, gradient: Tensor, norm: float) -> None:
        """One step against a meta-gradient ``(P,)``, at the learning rate that Adam has."""
        if self.clip_norm is not None:
            gradient = gradient * min(1.0, self.clip_norm / (norm + 1e-6))
        parameters = list(self.rule.parameters())
        for parameter, part in zip(parameters, gradient.split([parameter.numel() for parameter in parameters])):
            parameter.grad = part.view_as(parameter)
        self.adam.step()
        if self.average is not None:
            self.average.update_parameters(self.rule)

    def weights(self) -> dict[str, Tensor]:
        """What is validated and kept: the average, where there is one."""
        rule = self.rule if self.average is None else self.average.module
        return {name: value.detach().to("cpu", copy=True) for name, value in rule.state_dict().items()}

    def put(self, weights: dict[str, Tensor]) -> None:
        """Go on from other weights, with what Adam remembers."""
        self.rule.load_state_dict(weights)
        if self.average is not None:
            self.average.module.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        average = None if self.average is None else self.average.state_dict()
        return {"rule": self.rule.state_dict(), "average": average, "outer": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from :meth:`state_dict`."""
        self.rule.load_state_dict(state["rule"])
        self.adam.load_state_dict(state["outer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


class MetaTrainer(RuleTrainer[MetaTrainConfig]):
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
        ValueError: ``episodes`` or ``pool`` are not multiples of the number of processes; or ``config.backend`` is
            ``"native"``, which this machine or the rule does not have.

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
        super().__init__(rule, config, device)
        self._goes_on = isinstance(rule, UpdateRule)
        self.outer = Outer(self.rule, config)
        # Shares its parameters with the rule, so that gradients and updates are the rule's own.
        self._computed, self.backend = computed(self.rule, config)
        self.pool = Pool(self._computed, family, config, self.ranks)
        self.copies = self.pool.copies
        self._validation = Validation(self.rule, family, config, self.ranks)
        self.stage = 0
        self.skipped = 0
        self.best_update = 0
        self._last_better = 0
        self.best_weights = self.outer.weights()

    @property
    def finished(self) -> bool:
        """Whether all updates are done, or patience has run out."""
        return self.update >= self.config.updates or (self._gives_up() and self.stage >= self.config.last_stage)

    def records(self, stop: Stop) -> Iterator[Record]:
        """Train on, yielding one record per update.

        A record holds ``update``, ``meta_loss`` (the mean over the windows that were finite), ``grad_norm``,
        ``learning_rate``, ``steps`` (inner steps, counted once per copy); after a validation, ``validation`` and
        ``best``; where windows were skipped, ``skipped``, their tasks; and with a staged curriculum, ``stage``.

        Training stops after the update in which ``stop`` says so. Where processes train together, all stop when one of
        them is to.

        Raises:
            MetaTrainingError: more than ``max_skipped`` windows were not finite.
        """
        asked = False
        if self._goes_on and self.update == 0:
            self._judge()
        while not (self.finished or asked):
            record, asked = self._step(stop)
            if self.update % self.config.validate_every == 0 or self.update == self.config.updates:
                record |= self._judge()
            yield record

    def best_rule(self) -> UpdateRule:
        """The rule with the weights of the best validation so far."""
        rule = copy.deepcopy(self.rule)
        rule.load_state_dict(self.best_weights)
        return rule

    def validate(self) -> float:
        """:meth:`Validation.score` of the rule as it is: the same at every call."""
        return self._validation.score(self.outer.weights(), self.config.validation_horizon_at(self.stage))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: weights, outer optimizer, running episodes, generators, best so far.

        Where processes train together, all must call this, and all get the whole.
        """
        return {
            "config": self.config.to_dict(),
            "rule_config": self.rule.config.to_dict(),
            **self.outer.state_dict(),
            **self.pool.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from :meth:`state_dict`.

        Raises:
            OtherRunError: it was made with another configuration, or on tasks of other shapes.
        """
        state = modern_training(state)
        trained, ours = state.get("rule_config"), self.rule.config.to_dict()
        if trained != ours:
            raise OtherRunError(f"the checkpoint trains {trained}, this run {ours}")
        theirs, ours = from_flat(state["config"]), self.config.to_dict()
        if different := sorted(name for name in ours if theirs.get(name) != ours[name]):
            raise OtherRunError(
                f"the checkpoint was made with other settings: {different}; continue it with the same, or start anew"
            )
        self.outer.load_state_dict(state)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.pool.load_state_dict(state)
        self.copies = self.pool.copies

    def _step(self, stop: Stop) -> tuple[Record, bool]:
        """One update: its record, and whether any process is to stop after it."""
        config = self.config
        for group in self.outer.adam.param_groups:
            group["lr"] = learning_rate = config.learning_rate_at(self.update)
        rows, tasks, steps = [], [], 0
        for place in self.pool.due(self.update):
            slot = self.pool.slots.get(place) or self.pool.next(place, self.update, self.stage)
            estimator = self.pool.estimator(slot.imitates)
            length = estimator.steps(config.unroll_length, slot.horizon)
            torch.compiler.cudagraph_mark_step_begin()  # the memory of captured windows before may be used again
            estimate, slot.episode = estimator.estimate(
                self._computed, slot.episode, length, slot.generator, config.meta_objective
            )
            rows.append(torch.cat([estimate.gradient, estimate.meta_loss.reshape(1)]))
            tasks.append(repr(slot.episode.flat.task))
            steps += length * len(slot.episode.theta)
            if not torch.isfinite(estimate.meta_loss) or slot.episode.step >= slot.horizon:
                self.pool.next(place, self.update, self.stage)
        flags = rows[0].new_full((len(rows), 1), float(stop()))
        everything = self.ranks.gather(torch.cat([torch.stack(rows), flags], dim=1))
        everything, asked = everything[:, :-1], bool(everything[:, -1].any())
        finite = everything.isfinite().all(1)
        record: Record = {"update": self.update + 1}
        if not finite.all():
            record["skipped"] = self._skip(finite.tolist(), tasks)
        mean = everything[finite].mean(0)
        gradient, meta_loss = mean[:-1], mean[-1].item()
        grad_norm = gradient.norm().item()
        if finite.any():
            self.outer.follow(gradient, grad_norm)
        self.update += 1
        record |= {"meta_loss": meta_loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        record |= {"steps": steps * self.ranks.size}
        return record | ({"stage": self.stage} if isinstance(config.curriculum, Stages) else {}), asked

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

    def _judge(self) -> Record:
        """Validate; remember what is best; go on to the next stage of a curriculum when this one gives no more."""
        score = self.validate()
        if score < self.best_score:
            self.best_score, self.best_update, self.best_weights = score, self.update, self.outer.weights()
            self._last_better = self.update
        record = {"validation": score, "best": self.best_score}
        if self._gives_up() and self.stage < self.config.last_stage and self.update != self.config.updates:
            self._next_stage()
        return record

    def _next_stage(self) -> None:
        judged = self.config.validation_horizon_at(self.stage)
        self.stage += 1
        self.outer.put(self.best_weights)
        # The next stage has to do better than what it begins with. The last has the length of the one before.
        if self.config.validation_horizon_at(self.stage) != judged:
            self.best_score = self.validate()
        self._last_better = self.update
        for place in self.pool.slots:
            self.pool.next(place, self.update, self.stage)

    def _gives_up(self) -> bool:
        return self.config.out_of_patience(self.update - self._last_better)


_COUNTERS = ("update", "stage", "skipped", "seconds", "best_score", "best_update", "_last_better", "best_weights")
