"""Learning from a teacher: a hand-written optimizer whose updates the rule is to reproduce."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from learnedopt.meta.estimators import Estimate, Estimator, MetaObjective, flat_gradient
from learnedopt.meta.unroll import Episode
from learnedopt.rules import UpdateRule
from learnedopt.tasks.base import Task


@dataclass(frozen=True)
class Teacher(ABC):
    """Settings of a coordinate-wise optimizer of ``torch.optim``."""

    lr: float = 0.01
    decay_steps: float | None = None
    """The learning rate at step t is ``lr / (1 + t / decay_steps)``; ``None`` for a constant one."""

    def __post_init__(self) -> None:
        if not (0.0 < self.lr < math.inf and (self.decay_steps is None or 0.0 < self.decay_steps < math.inf)):
            raise ValueError(f"a teacher needs a positive lr and decay_steps, got {self.lr} and {self.decay_steps}")

    @abstractmethod
    def optimizer(self, theta: Tensor) -> torch.optim.Optimizer:
        """The optimizer of ``theta``, which holds several optimizees in its rows."""

    def lr_at(self, step: int) -> float:
        """The learning rate of a step; the first is 0."""
        return self.lr if self.decay_steps is None else self.lr / (1.0 + step / self.decay_steps)


@dataclass(frozen=True)
class SGDTeacher(Teacher):
    """``torch.optim.SGD``, by default with Nesterov momentum."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True

    def optimizer(self, theta: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([theta], lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class AdamTeacher(Teacher):
    """``torch.optim.Adam``."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def optimizer(self, theta: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([theta], lr=self.lr, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class Imitation(Estimator):
    r"""Regression of the rule's updates on a teacher's, along the teacher's own path.

    The episode is the teacher's: it moves the optimizee, and the rule, which sees the same gradients and keeps its
    state from window to window, is asked at every step what it would have done. The loss of a window of one copy is

    .. math::
        \frac{\sum_t \|\Delta_t - \Delta_t^{\mathrm{teacher}}\|^2}{\sum_t \|\Delta_t^{\mathrm{teacher}}\|^2}

    1 for a rule that does nothing, 0 for the teacher itself, whatever the scale of its steps (the authors use half
    the plain squared error). It is no estimate of any meta-objective's gradient: it is biased towards the teacher.

    Source: Chen et al., "Training stronger baselines for learning to optimize", NeurIPS 2020 (arXiv:2010.09089),
    section 3.2.
    """

    teacher: AdamTeacher | SGDTeacher = field(default_factory=AdamTeacher)
    share: float = 1.0
    """The probability that an episode is one of imitation."""
    updates: int | None = None
    """Only episodes that begin before this update imitate; ``None`` for all along."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"the share of imitation must be above 0 and at most 1, got {self.share}")
        if self.updates is not None and self.updates < 1:
            raise ValueError(f"the updates of imitation must be at least 1, or None, got {self.updates}")

    def takes(self, drawn: float, update: int) -> bool:
        """Whether an episode that begins at an update imitates, for a number drawn from [0, 1)."""
        return drawn < self.share and (self.updates is None or update < self.updates)

    def start(self, rule: UpdateRule, task: Task, generator: Generator) -> Episode:
        episode = super().start(rule, task, generator)
        _, optimizer = self._teacher(episode)
        return replace(episode, memory=_tensors(optimizer))

    def estimate(
        self, rule: UpdateRule, episode: Episode, steps: int, generator: Generator, objective: MetaObjective
    ) -> tuple[Estimate, Episode]:
        flat, task = episode.flat, episode.flat.task
        theta, optimizer = self._teacher(episode)
        state, loss, grad = episode.state, episode.loss, episode.grad
        errors, scale = [], torch.zeros_like(episode.loss)
        for step in range(steps):
            before = theta.detach().clone()  # the teacher works in place
            with torch.enable_grad():
                delta, state = rule.update(before.flatten(), grad.flatten(), state, flat.segments, loss)
            theta.grad = grad
            optimizer.param_groups[0]["lr"] = self.teacher.lr_at(episode.step + step)
            optimizer.step()
            wanted = theta.detach() - before
            with torch.enable_grad():
                errors.append((delta.view_as(wanted) - wanted).square().sum(1))
            scale = scale + wanted.square().sum(1)
            loss, grad = flat.loss_and_grad(theta, task.sample(generator))
        with torch.enable_grad():
            error = (torch.stack(errors).sum(0) / scale.clamp(min=torch.finfo(scale.dtype).tiny)).mean()
            gradient = flat_gradient(error, rule)
        after = replace(
            episode,
            theta=theta.detach().clone(),
            state={name: value.detach() for name, value in state.items()},
            loss=loss,
            grad=grad,
            step=episode.step + steps,
            memory=_tensors(optimizer),
        )
        return Estimate(gradient, error.detach()), after

    def _teacher(self, episode: Episode) -> tuple[Tensor, torch.optim.Optimizer]:
        """The parameters and the optimizer over them, as the episode's memory has it."""
        theta = episode.theta.clone().requires_grad_()
        optimizer = self.teacher.optimizer(theta)
        if episode.memory:
            state: dict[str, Any] = {name: value.clone() for name, value in episode.memory.items()}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state}})
        return theta, optimizer


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state; its tensors are this optimizer's alone, which is not used again."""
    states = optimizer.state_dict()["state"]
    return {name: value for name, value in states.get(0, {}).items() if isinstance(value, Tensor)}
