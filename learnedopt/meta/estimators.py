"""Estimators of the meta-gradient: what a window of an episode says about how to change the meta-parameters.

A new estimator is one class with :meth:`Estimator.estimate`, and one line in :data:`~learnedopt.meta.ESTIMATORS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from learnedopt.meta.objectives import meta_losses
from learnedopt.meta.unroll import Episode, start_episode, unroll
from learnedopt.rules import UpdateRule
from learnedopt.tasks.base import Split, Task


@dataclass(frozen=True)
class MetaObjective:
    """What is estimated the gradient of: :func:`~learnedopt.meta.objectives.meta_losses` over the steps of a window.

    Losses are taken on ``split`` of the tasks.
    """

    objective: str = "loss"
    weighting: str = "uniform"
    split: Split = "train"

    def __call__(self, losses: Tensor, initial: Tensor) -> Tensor:
        """Losses ``(steps, copies)`` and initial losses ``(copies,)`` to one number per copy."""
        return meta_losses(losses, initial, self.objective, self.weighting)


@dataclass(frozen=True)
class Estimate:
    """What one window gave."""

    gradient: Tensor
    """``(P,)``: all meta-parameters flattened, in the order of ``rule.parameters()``."""
    meta_loss: Tensor
    """The meta-objective, averaged over copies; 0-d."""


class Estimator(ABC):
    """How meta-gradients are estimated. Estimators are frozen settings; what they remember is in the episode."""

    fewest_copies: ClassVar[int] = 1
    """Copies of each task that an estimate needs."""
    perturbs_weights: ClassVar[bool] = False
    """Whether the rule is evaluated with other weights for every copy, which takes ``torch.func.vmap`` over them."""

    def start(self, rule: UpdateRule, task: Task, generator: Generator) -> Episode:
        """Begin an episode on a task."""
        return start_episode(rule, task, generator)

    def steps(self, unroll_length: int, horizon: int) -> int:
        """How many inner steps each window takes, for the trainer's ``unroll_length`` and an episode's horizon."""
        return unroll_length

    @abstractmethod
    def estimate(
        self, rule: UpdateRule, episode: Episode, steps: int, generator: Generator, objective: MetaObjective
    ) -> tuple[Estimate, Episode]:
        """Run one window.

        Args:
            rule: The rule; its parameters are not changed and get no ``grad``.
            episode: Where the window starts; left as it is.
            steps: Length of the window.
            generator: Draws batches, and perturbations if there are any.
            objective: What is to be lowered.

        Returns:
            The estimate, and the episode at the window's end.
        """


@dataclass(frozen=True)
class TruncatedBPTT(Estimator):
    r"""Backpropagation through the window, from constants at its start.

    Exact for what the window itself shows, and blind to everything later: the estimate is biased towards rules
    that pay off within ``unroll_length`` steps, which means towards steps too small for the long run (the
    short-horizon bias of Wu et al. 2018, arXiv:1803.02021). With ``second_order=False`` the gradients of the
    optimizee count as constants too, :math:`\partial g_t / \partial\phi := 0` (Andrychowicz et al. 2016,
    arXiv:1606.04474, section 2.1): a second bias, for an unroll that keeps no graph through the optimizee.

    Source: Werbos, "Backpropagation through time: what it does and how to do it", 1990; Williams & Peng, "An
    efficient gradient-based algorithm for on-line training of recurrent network trajectories", 1990.
    """

    second_order: bool = False
    recompute: bool = False
    """Keep only the states of the window for the backward pass, not what was computed between them."""

    def estimate(
        self, rule: UpdateRule, episode: Episode, steps: int, generator: Generator, objective: MetaObjective
    ) -> tuple[Estimate, Episode]:
        with torch.enable_grad():
            losses, after = unroll(
                rule,
                episode,
                steps,
                generator,
                self.second_order,
                split=objective.split,
                recompute=self.recompute,
            )
            meta_loss = objective(losses, episode.initial_loss).mean()
            return Estimate(flat_gradient(meta_loss, rule), meta_loss.detach()), after


@dataclass(frozen=True)
class FullBPTT(TruncatedBPTT):
    """Backpropagation through the whole episode: one window as long as the horizon.

    Unbiased, with ``second_order``, which is the default here. Its memory grows with the horizon, and over long
    horizons its variance can grow without bound (Metz et al. 2019, arXiv:1810.10180, section 3).
    """

    second_order: bool = True

    def steps(self, unroll_length: int, horizon: int) -> int:
        return horizon


def flat_gradient(meta_loss: Tensor, rule: UpdateRule) -> Tensor:
    """The gradient with respect to all meta-parameters, ``(P,)``; zero for those that were not used."""
    parameters = list(rule.parameters())
    gradients = torch.autograd.grad(meta_loss, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
