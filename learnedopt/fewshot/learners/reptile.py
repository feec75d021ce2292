"""Reptile: move the initialization towards where training on each episode leads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from learnedopt.fewshot.config import check_count, check_positive
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners.inner_loop import (
    InnerLoopConfig,
    InnerLoopLearner,
    Params,
    Record,
    flatten,
    unflatten,
)


@dataclass(frozen=True)
class ReptileConfig(InnerLoopConfig):
    """Settings of :class:`Reptile`; the defaults are the paper's for Omniglot, 5-way, trained on 10 shots.

    The outer optimizer is gradient descent without momentum, its learning rate the paper's meta step size, which falls
    from 1 to 0. 20-way: ``learning_rate=5e-4, steps=10, batch_size=20, test_batch_size=10``. Mini-ImageNet, trained on
    15 shots: ``steps=8, batch_size=10``, and ``test_batch_size=5`` for 1-shot, 15 for 5-shot.
    """

    kind: ClassVar[str] = "reptile"
    steps: int = 5
    test_steps: int | None = 50
    learning_rate: float = 1e-3
    """Of the inner loop's Adam, without momentum."""
    beta2: float = 0.999
    batch_size: int = 10
    """Support examples in an update."""
    test_batch_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "learning_rate")
        check_count(self, "batch_size", "test_batch_size")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be at least 0 and below 1, got {self.beta2}")
        if self.adapted != "all":
            raise ValueError("Reptile learns only what it adapts: adapted must be 'all'")
        if self.readout != "per_class":
            raise ValueError("Reptile moves towards adapted weights, of one class each: readout must be 'per_class'")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> Reptile:
        return Reptile(self, backbone, shape)


class Reptile(InnerLoopLearner):
    r"""Learns an initialization by moving it towards the parameters that training on each episode arrives at.

    .. math::
        \theta \leftarrow \theta + \epsilon\, \frac1E \sum_e (\phi_e - \theta)

    with :math:`\phi_e` after ``steps`` updates of Adam (:math:`\beta_1 = 0`) on minibatches of the support set. Queries
    take no part: the gradient of :meth:`meta_loss` is :math:`\theta - \frac1E \sum_e \phi_e`, and its value the inner
    loss at the last update. As in the authors' code, Adam's second moments go on from episode to episode; here all
    episodes of a batch start from the same, and their mean goes on. Minibatches are drawn without replacement, in an
    order that is always the same.

    Source: Nichol, Achiam & Schulman, "On first-order meta-learning algorithms", 2018 (arXiv:1803.02999), sections 3
    and 6.1.

    >>> from learnedopt.fewshot.backbones import MLP
    >>> from learnedopt.fewshot.learner import LearnerShape
    >>> learner = ReptileConfig().build(MLP((4,)), LearnerShape((3,), ways=2))
    >>> learner.fit(torch.eye(2, 3), torch.arange(2)).predict(torch.eye(3)).shape
    torch.Size([3, 2])
    """

    config: ReptileConfig
    moments: Tensor
    updates: Tensor

    def __init__(self, config: ReptileConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape)
        self.register_buffer("moments", torch.zeros_like(flatten(super().initial(1, shape.ways))[0].detach()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._ended: list[Tensor] = []

    @property
    def differentiable(self) -> bool:
        return False

    def meta_loss(self, episodes: Episodes) -> Tensor:
        self._ended.clear()
        found = super().meta_loss(episodes)
        if self._ended:
            self.moments.copy_(torch.cat(self._ended).mean(0))
            self.updates.add_(self.config.steps)
        return found

    def query_losses(self, episodes: Episodes, record: Record | None) -> Tensor:
        if not self.training:
            with torch.no_grad():
                return super().query_losses(episodes, record)
        start = {name: value for name, value in self.model.named_parameters() if name in self.adapted_names}
        *_, last = self._adam(episodes.support_x, episodes.support_y, episodes.ways, record)
        theta = torch.cat([value.flatten() for value in start.values()])
        # Linear in theta, so that its gradient is the pseudo-gradient, and its value the loss.
        product = ((theta.detach() - last.theta) * theta).sum(1)
        self._ended.append(last.moments)
        return last.losses + product - product.detach()

    def trajectory(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None = None) -> Iterator[Params]:
        params = self.initial(len(x), ways)
        for state in self._adam(x, y, ways, record):
            yield unflatten(state.theta, params)

    def _adam(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None) -> Iterator[_Adam]:
        config = self.config
        params = self.initial(len(x), ways)
        theta, moments = flatten(params), self.moments.expand(len(x), -1)
        size = config.batch_size if self.training else config.test_batch_size
        chosen = _minibatches(x.shape[1], size)
        for step in range(self.steps):
            rows = next(chosen).to(x.device)
            support = self.support(x[:, rows], record, second_order=False)
            losses, grads = self.loss_and_grad(params, step, support, y[:, rows], ways, False, record)
            grad = flatten(grads)
            moments = config.beta2 * moments + (1 - config.beta2) * grad.square()
            corrected = moments / (1 - config.beta2 ** (int(self.updates) + step + 1))
            theta = theta - config.learning_rate * grad / (corrected.sqrt() + 1e-8)
            params = unflatten(theta, params)
            yield _Adam(theta, moments, losses)


@dataclass(frozen=True, eq=False)
class _Adam:
    theta: Tensor
    moments: Tensor
    losses: Tensor


def _minibatches(count: int, size: int) -> Iterator[Tensor]:
    """Places of ``size`` of ``count`` examples, over and over; all occur once before any occurs again."""
    generator = Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.int64)
    size = min(size, count)
    while True:
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]
