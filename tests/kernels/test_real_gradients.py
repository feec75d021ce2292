"""Backends against the reference where gradients are as networks have them: correlated, of low rank, of any scale.

Drawn gradients have full rank and one size, and bases hardly matter to them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.kernels import BackendName

STEPS = 25
RULES = ["default", "light", "sf-adam-1", "adam-lstm"]
"""Not those with a threshold in their bases, as sf-eigen-1: on which side of it an element falls, rounding decides."""
Run = tuple[list[Tensor], list[list[Tensor]]]
"""Parameters at the beginning, and gradients of every step."""


def of_low_rank() -> Run:
    """Sums of two outer products each, the same directions in most of the steps, and vectors."""
    g = torch.Generator().manual_seed(0)
    shapes = ((12, 20), (24, 10), (16, 16), (6, 4, 3, 3), (20,))
    params = [torch.randn(shape, generator=g) / 5 for shape in shapes]
    rows, columns = ([torch.randn(2, n, generator=g) for n in sizes] for sizes in ((12, 24, 16, 6), (20, 10, 16, 36)))
    steps = []
    for step in range(STEPS):
        grads = []
        for shape, left, right in zip(shapes, rows, columns):
            if step % 10 == 9:
                left = torch.randn(left.shape, generator=g)
            sizes = torch.randn(2, 1, generator=g) * torch.tensor([[1.0], [0.1]])
            grads.append((left.T @ (sizes * right)).view(shape))
        steps.append([*grads, torch.randn(20, generator=g)])
    return params, steps


def of_a_network() -> Run:
    """Batches of four, so that gradients have four directions; units that are dead at times; a rare class."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 24), nn.ReLU(), nn.Linear(24, 5)
        )
    params = [param.detach().clone() for param in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    means, steps = torch.randn(5, 1, 8, 8, generator=g), []
    for _ in range(STEPS):
        labels = torch.randint(0, 5, (4,), generator=g) * (torch.rand(4, generator=g) < 0.8)
        optimizer.zero_grad()
        inputs = means[labels] + 0.5 * torch.randn(4, 1, 8, 8, generator=g)
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        steps.append([param.grad.clone() for param in net.parameters() if param.grad is not None])
    return params, steps


RUNS: dict[str, Callable[[], Run]] = {"low rank": cache(of_low_rank), "network": cache(of_a_network)}


def moved(name: str, run: str, backend: BackendName, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Any:
    """Parameters after given gradients, so that no difference feeds upon itself through a loss."""
    params, steps = RUNS[run]()
    tensors = [param.to(dtype, copy=True).requires_grad_() for param in params]
    optimizer = LearnedOptimizer(tensors, name, backend=backend)
    for grads in steps:
        for tensor, grad in zip(tensors, grads):
            tensor.grad = scale * grad.to(dtype)
        optimizer.step()
    return [tensor.detach() for tensor in tensors]


def apart(one: list[Tensor], other: list[Tensor], start: list[Tensor]) -> float:
    """The largest difference between two ends of a tensor, over the largest way that it went."""
    pairs = zip(one, other, start, strict=True)
    return max(float((a.double() - b.double()).abs().max() / (b.double() - s).abs().max()) for a, b, s in pairs)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", RULES)
def test_float32_moves_as_float64_does(name: str, run: str, backend: BackendName) -> None:
    start, _ = RUNS[run]()
    exact = moved(name, run, "reference", torch.float64)
    assert apart(moved(name, run, backend), exact, start) < 1e-4


@pytest.mark.parametrize("scale", [1e-4, 1e6])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["default", "light", "sf-adam-1"])
def test_the_scale_of_the_loss_does_not_matter_at_the_eps_of_the_zoo(name: str, run: str, scale: float) -> None:
    start, _ = RUNS[run]()
    assert apart(moved(name, run, "auto", scale=scale), moved(name, run, "auto"), start) < 1e-3


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("shape", [(24, 20), (40, 12), (9, 600), (12, 3, 3, 3)])
def test_rows_and_columns_without_gradient_stay_to_the_last_bit(shape: tuple[int, ...], backend: BackendName) -> None:
    """Units that are dead, inputs that are always zero: in bases, rounding errors would reach them."""
    g = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=g).requires_grad_()
    before, optimizer = param.detach().clone(), LearnedOptimizer([param], "default", backend=backend)
    for _ in range(STEPS):
        param.grad = torch.randn(shape, generator=g)
        param.grad[[1, 5]] = 0.0
        param.grad[:, 2] = 0.0
        optimizer.step()
    moved = param.detach() != before
    assert not moved[[1, 5]].any() and not moved[:, 2].any()
    moved[[1, 5]] = moved[:, 2] = True
    assert moved.all()
