"""What the tests of few-shot learners share: a small network with batch normalization, small episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.learner import Learner, LearnerShape
from learnedopt.fewshot.learners import LEARNERS
from learnedopt.fewshot.learners.inner_loop import InnerLoopLearner

WAYS, CLASSES, EXAMPLE = 3, 7, (4,)
SHORT: dict[str, dict[str, Any]] = {
    "meta_lstm": {"steps": 3},
    "maml_pp": {"steps": 2},
    "maml": {"test_steps": 2},
    "anil": {"test_steps": 2},
    "finetune": {"steps": 2},
    "reptile": {"steps": 2, "batch_size": 4, "test_steps": 3, "test_batch_size": 4},
}
"""Inner loops that take little time."""


class Smooth(nn.Module):
    """Nothing in it has a kink; the batch normalization is not where a walk over direct children would find it."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(5) if batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Sequential(norm, nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> Tensor:
    """Noise of two channels, in float64."""
    return torch.randn(count, 2, 4, 4, generator=generator(seed), dtype=torch.float64)


def backbone(batch_norm: bool = True) -> nn.Module:
    module = Smooth(batch_norm).double()
    draws = generator(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.7 * torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    return module


def make(kind: str, batch_norm: bool = True, ways: int | None = WAYS, **settings: Any) -> Learner:
    """A learner in float64, with random weights wherever it would start from zero or one. Episodes go together."""
    config = LEARNERS[kind](**{"episodes_at_once": 100, **SHORT.get(kind, {}), **settings})
    return config.build(backbone(batch_norm), LearnerShape(EXAMPLE, ways, CLASSES), generator(2)).double()


def episodes(count: int = 3, shots: int = 2, queries: int = 2, seed: int = 0, ways: int | None = WAYS) -> Episodes:
    """Examples of noise around class means, in float64; for regression, noise."""
    draws = generator(seed)
    support, query = (ways or 1) * shots, (ways or 1) * queries
    x = torch.randn(count, support + query, *EXAMPLE, generator=draws, dtype=torch.float64)
    if ways is None:
        y = torch.randn(count, support + query, 1, generator=draws, dtype=torch.float64)
        return Episodes(x[:, :support], y[:, :support], x[:, support:], y[:, support:], None)
    means = torch.randn(count, ways, *EXAMPLE, generator=draws, dtype=torch.float64)
    labels = [torch.arange(ways).repeat_interleave(number).expand(count, -1) for number in (shots, queries)]
    x = x + torch.cat([means.repeat_interleave(number, 1) for number in (shots, queries)], dim=1)
    return Episodes(x[:, :support], labels[0], x[:, support:], labels[1], ways)


def meta_gradient(learner: Learner, of: Episodes) -> Tensor:
    """All parameters' gradients of the meta-loss, flat; zero where there is none."""
    learner.zero_grad()
    learner.meta_loss(of).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def derivatives(operation: Callable[..., Tensor], values: Sequence[Tensor | None], order: int) -> list[Tensor]:
    """The derivatives by all inputs of a function of the outputs, of a function of these derivatives, and so on."""
    wanted = [value for value in values if value is not None]
    found = [operation(*values)]
    for _ in range(order):
        total = torch.stack(
            [(value * torch.linspace(-1.0, 2.0, value.numel()).view(value.shape)).pow(3).sum() for value in found]
        )
        found = list(torch.autograd.grad(total.sum(), wanted, create_graph=True))
    return found


def assert_gradient_is_exact(learner: Learner, of: Episodes, step: float = 1e-6) -> None:
    """Compare the meta-gradient with central differences of the meta-loss, along random directions for each tensor."""
    gradients = meta_gradient(learner, of).split([weight.numel() for weight in learner.parameters()])
    draws = generator(9)
    slopes = []
    for weight, gradient in zip(learner.parameters(), gradients):
        for _ in range(2):
            direction = torch.randn(weight.shape, generator=draws, dtype=torch.float64)
            origin, losses = weight.detach().clone(), []
            for sign in (1, -1):
                with torch.no_grad():
                    weight.copy_(origin + sign * step * direction)
                    losses.append(learner.meta_loss(of).item())
            weight.data.copy_(origin)
            slopes.append(((losses[0] - losses[1]) / (2 * step), (gradient * direction.flatten()).sum().item()))
    expected, found = torch.tensor(slopes, dtype=torch.float64).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 1e-2


def equal_outputs(learner: Learner) -> None:
    """Make all classes start alike, where the learner has a read-out with a row for each."""
    if isinstance(learner, InnerLoopLearner):
        rows = learner.shape.ways
        with torch.no_grad():
            for weight in learner.parameters():
                if len(weight) == rows:
                    weight.copy_(weight[:1].expand_as(weight))
