"""Gradients from losses alone: evolution strategies, and their mixture with backpropagation.

All of them run every copy of a task twice, with the meta-parameters moved to either side of where they are: an
*antithetic pair*, which shares its start and its batches. Both members and all copies are vectorised, so a rule is
evaluated with as many different weights at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from learnedopt.meta.estimators import Estimate, Estimator, MetaObjective
from learnedopt.meta.unroll import Episode, start_episode, unroll
from learnedopt.rules import Segments, State, UpdateRule
from learnedopt.tasks.base import Batch, Params, Split, Task


@dataclass(frozen=True, eq=False)
class Repeated(Task):
    """Another task with every copy there several times: first all of them, then all of them again, and so on."""

    task: Task
    times: int

    @property
    def copies(self) -> int:  # type: ignore[override]
        return self.times * self.task.copies

    def init(self, generator: Generator) -> Params:
        return {name: torch.cat([value] * self.times) for name, value in self.task.init(generator).items()}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return tuple(torch.cat([item] * self.times) for item in self.task.sample(generator, split))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.task.loss(params, batch)


class _Update(nn.Module):
    """A rule whose call is :meth:`~UpdateRule.advance`, since only calls can be given other parameters."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *args: Any) -> tuple[Tensor, State]:
        return self.rule.advance(*args)


class PerCopy:
    """A rule that has weights of its own for every copy.

    Args:
        rule: The rule.
        weights: ``(copies, P)``: the meta-parameters of each, flattened in the order of ``rule.parameters()``.
    """

    def __init__(self, rule: UpdateRule, weights: Tensor) -> None:
        self._update = _Update(rule)
        named = dict(self._update.named_parameters())
        parts = weights.split([value.numel() for value in named.values()], dim=1)
        self._weights = {name: part.reshape(len(weights), *named[name].shape) for name, part in zip(named, parts)}
        self._copies = len(weights)

    def update(
        self, param: Tensor, grad: Tensor, state: State, segments: Segments, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As :meth:`learnedopt.rules.UpdateRule.update`, each copy with its own weights."""
        return self._update.rule.update(param, grad, state, segments, loss, advance=self._advance)

    def _advance(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        alone = Segments(segments.sizes, shapes=segments.shapes)

        def one(weights: dict[str, Tensor], *args: Any) -> tuple[Tensor, State]:
            param, grad, state, loss, own = args
            delta, after = torch.func.functional_call(self._update, weights, (param, grad, state, alone, loss, own))
            return delta, after

        def by_copy(values: Tensor) -> Tensor:
            return values.view(self._copies, -1)

        names = self._update.rule.state_spec()
        states = {name: state[name].unflatten(-1, (self._copies, -1)).movedim(-2, 0) for name in names}
        losses = param.new_zeros(self._copies) if loss is None else loss
        owned = None if own is None else (by_copy(own[0]), by_copy(own[1]))
        in_dims = (0, 0, 0, 0, 0, None if own is None else 0)
        delta, after = torch.func.vmap(one, in_dims)(
            self._weights, by_copy(param), by_copy(grad), states, losses, owned
        )
        return delta.flatten(), {name: value.movedim(0, -2).flatten(-2) for name, value in after.items()}


@dataclass(frozen=True)
class _Antithetic(Estimator):
    perturbs_weights: ClassVar[bool] = True
    std: float = 0.01
    r"""Standard deviation :math:`\sigma` of the perturbations."""

    def __post_init__(self) -> None:
        if not 0.0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite, got {self.std}")

    def start(self, rule: UpdateRule, task: Task, generator: Generator) -> Episode:
        return start_episode(rule, Repeated(task, 2), generator)

    def _perturbation(self, rule: UpdateRule, episode: Episode, generator: Generator) -> Tensor:
        """Drawn on the CPU, so that every device sees the same: ``(pairs, P)``."""
        center = flat_weights(rule)
        noise = torch.randn(len(episode.theta) // 2, len(center), generator=generator)
        return self.std * noise.to(center)

    def _run(
        self,
        rule: UpdateRule,
        weights: Tensor,
        episode: Episode,
        steps: int,
        generator: Generator,
        objective: MetaObjective,
        second_order: bool = False,
    ) -> tuple[Tensor, Episode]:
        """Meta-losses ``(2 * pairs,)`` under ``weights``, and the episode after."""
        losses, after = unroll(
            PerCopy(rule, weights), episode, steps, generator, second_order, split=objective.split
        )  # fmt: skip
        return objective(losses, episode.initial_loss), after

    def _slopes(self, perturbation: Tensor, values: Tensor) -> Tensor:
        r"""One estimate per pair, ``(pairs, P)``: :math:`\epsilon (L^+ - L^-) / 2\sigma^2`."""
        plus, minus = values.chunk(2)
        return perturbation * ((plus - minus) / (2.0 * self.std**2)).unsqueeze(1)


@dataclass(frozen=True)
class ES(_Antithetic):
    r"""Evolution strategies with antithetic pairs, on one window.

    .. math::
        \hat g = \frac{1}{2 \sigma^2 n} \sum_{i=1}^{n} \epsilon_i \big(L(\phi + \epsilon_i) - L(\phi - \epsilon_i)\big),
        \qquad \epsilon_i \sim \mathcal N(0, \sigma^2 I)

    Unbiased for the gradient of the *smoothed* window objective :math:`\mathbb E_\epsilon\, L(\phi + \epsilon)`,
    second-order effects included, whatever kinks and cliffs L has; as a gradient of L itself it is biased by
    :math:`O(\sigma^2)`. Over windows shorter than the episode it has the short-horizon bias of truncation, since
    both members of a pair start each window from the same point, where the positive member of the last one ended.
    Set ``unroll_length`` to the horizon for none. Its variance grows with the number of meta-parameters.

    Source: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning", 2017
    (arXiv:1703.03864), section 2; for learned optimizers Metz et al. 2019 (arXiv:1810.10180), section 4.
    """

    def estimate(
        self, rule: UpdateRule, episode: Episode, steps: int, generator: Generator, objective: MetaObjective
    ) -> tuple[Estimate, Episode]:
        with torch.no_grad():
            perturbation, center = self._perturbation(rule, episode, generator), flat_weights(rule)
            weights = torch.cat([center + perturbation, center - perturbation])
            values, after = self._run(rule, weights, episode, steps, generator, objective)
            gradient = self._slopes(perturbation, values).mean(0)
        return Estimate(gradient, values.mean()), _positive(after)


@dataclass(frozen=True)
class FullES(ES):
    """Evolution strategies on whole episodes: one window as long as the horizon, and so no truncation bias.

    An update takes as long as an episode. For the same number of inner steps its variance is lower than that of
    :class:`PES`, whose perturbations change from window to window, and there are fewer updates.
    """

    def steps(self, unroll_length: int, horizon: int) -> int:
        return horizon


@dataclass(frozen=True)
class PES(_Antithetic):
    r"""Persistent evolution strategies: windows as short as one likes, without truncation bias.

    Both members of a pair go on from their own ends, with a fresh perturbation in each window, and each window's
    loss difference is correlated with the *sum* of all perturbations of the episode so far:

    .. math::
        \hat g = \frac{1}{2 \sigma^2 n} \sum_i \xi_i \big(L_i^+ - L_i^-\big), \qquad \xi_i = \sum_{k} \epsilon_i^{(k)}

    Unbiased for the gradient of the smoothed objective of the whole episode, summed over its windows, the
    smoothing being over a perturbation per window. Its variance grows with the number of windows in an episode.
    An estimate is biased only by what changes while an episode runs: the meta-parameters are updated after every
    window, so that early windows were run with older ones.

    Source: Vicol, Metz & Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with
    persistent evolution strategies", ICML 2021 (arXiv:2112.13835), section 4.
    """

    def start(self, rule: UpdateRule, task: Task, generator: Generator) -> Episode:
        episode = super().start(rule, task, generator)
        center = flat_weights(rule)
        return replace(episode, memory={"perturbation": center.new_zeros(task.copies, len(center))})

    def estimate(
        self, rule: UpdateRule, episode: Episode, steps: int, generator: Generator, objective: MetaObjective
    ) -> tuple[Estimate, Episode]:
        with torch.no_grad():
            perturbation, center = self._perturbation(rule, episode, generator), flat_weights(rule)
            weights = torch.cat([center + perturbation, center - perturbation])
            values, after = self._run(rule, weights, episode, steps, generator, objective)
            total = episode.memory["perturbation"] + perturbation
            gradient = self._slopes(total, values).mean(0)
        return Estimate(gradient, values.mean()), replace(after, memory={"perturbation": total})


@dataclass(frozen=True)
class VarianceMixture(_Antithetic):
    r"""Backpropagation and evolution strategies on the same perturbed windows, mixed by inverse variance.

    Every pair gives two estimates of the same smoothed gradient: the mean of its members' backpropagated gradients,
    :math:`p_i`, and the difference of their losses, :math:`e_i`. With :math:`v_p, v_e` the variances of either over
    the pairs, separately for every meta-parameter,

    .. math::
        \hat g = \frac{v_e\, \bar p + v_p\, \bar e}{v_p + v_e}

    Where backpropagation explodes its variance does too, and the losses decide. With ``second_order`` each of the two
    is unbiased for the smoothed window objective (truncation bias as in :class:`ES`), the mixture up to the error of
    estimating the weights from the pairs they are applied to; without it, :math:`p_i` and so the mixture have the
    first-order bias of :class:`~learnedopt.meta.TruncatedBPTT`. Needs two pairs at least.

    Source: Metz et al., "Understanding and correcting pathologies in the training of learned optimizers", ICML 2019
    (arXiv:1810.10180), section 4.2.
    """

    fewest_copies: ClassVar[int] = 2
    second_order: bool = True

    def estimate(
        self, rule: UpdateRule, episode: Episode, steps: int, generator: Generator, objective: MetaObjective
    ) -> tuple[Estimate, Episode]:
        with torch.no_grad():
            perturbation, center = self._perturbation(rule, episode, generator), flat_weights(rule)
            weights = torch.cat([center + perturbation, center - perturbation])
        with torch.enable_grad():
            weights.requires_grad_()
            values, after = self._run(rule, weights, episode, steps, generator, objective, self.second_order)
            (pathwise,) = torch.autograd.grad(values.sum(), weights)
        with torch.no_grad():
            values = values.detach()
            by_losses = self._slopes(perturbation, values)
            by_path = torch.stack(pathwise.chunk(2)).mean(0)
            path_mean, path_variance = by_path.mean(0), by_path.var(0)
            loss_mean, loss_variance = by_losses.mean(0), by_losses.var(0)
            share = loss_variance / (path_variance + loss_variance).clamp(min=torch.finfo(center.dtype).tiny)
            gradient = torch.lerp(loss_mean, path_mean, share)
            # Infinite or NaN backpropagated gradients have all the variance there is.
            gradient = torch.where(path_mean.isfinite() & path_variance.isfinite(), gradient, loss_mean)
        return Estimate(gradient, values.mean()), _positive(after)


def flat_weights(rule: UpdateRule) -> Tensor:
    """All meta-parameters, ``(P,)``, detached."""
    return torch.cat([weight.detach().flatten() for weight in rule.parameters()])


def _positive(episode: Episode) -> Episode:
    """Both members of every pair where the positive one is."""

    def first_half(values: Tensor) -> Tensor:
        half = values.unflatten(-1, (2, -1))[..., 0, :]
        return torch.cat([half, half], dim=-1)

    half = len(episode.theta) // 2
    return replace(
        episode,
        theta=episode.theta[:half].repeat(2, 1),
        grad=episode.grad[:half].repeat(2, 1),
        loss=first_half(episode.loss),
        state={name: first_half(values) for name, values in episode.state.items()},
    )
