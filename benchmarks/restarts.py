"""What learned rules do where a run does not begin with drawn weights: the figures of docs/drop_in.md.

A network of three layers on the digits of scikit-learn. Either it goes on after 1,000 steps with a new optimizer, with
and without the old one's state, or its first layer is frozen for 800 steps. Printed: the loss before, the highest mean
loss of five steps in a row within the 200 that follow, and the loss after them. A minute on one core:

    python benchmarks/restarts.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from learnedopt import LearnedOptimizer

AFTER, WARMUP, WINDOW = 200, 100, 5
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "default": lambda params: LearnedOptimizer(params, "default"),
    "light": lambda params: LearnedOptimizer(params, "light"),
    "adamw": lambda params: AdamW(params, lr=1e-3),
}
FACTORS: dict[str, Callable[[int], float]] = {
    "lr as it is": lambda step: 1.0,
    "a tenth of lr": lambda step: 0.1,
    "warmup": lambda step: min(1.0, (step + 1) / WARMUP),
}
"""What ``lr`` is multiplied by in each step after the change."""


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data / 16.0, dtype=torch.float32), torch.tensor(found.target)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def train(
    net: nn.Module, optimizer: Optimizer, steps: int, seed: int, factor: Callable[[int], float] | None = None
) -> list[float]:
    """Losses; ``factor`` is of the last group alone."""
    (x, y), generator, losses = digits(), torch.Generator().manual_seed(seed), []
    group = optimizer.param_groups[-1]
    lr = group["lr"]
    for step in range(steps):
        if factor is not None:
            group["lr"] = lr * factor(step)
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def loss_of(net: nn.Module) -> float:
    x, y = digits()
    return F.cross_entropy(net(x), y).item()


def show(name: str, before: float, losses: list[float], after: float) -> None:
    worst = max(sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1))
    print(f"{name:40} {before:8.4f} {worst:8.4f} {after:8.4f}", flush=True)


def restart(name: str) -> None:
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 1000, seed=1)
    for way in ("with state", *FACTORS):
        again = copy.deepcopy(net)
        new = OPTIMIZERS[name](again.parameters())
        if way == "with state":
            new.load_state_dict(optimizer.state_dict())
        losses = train(again, new, AFTER, seed=2, factor=FACTORS.get(way))
        show(f"{name}, restarted, {way}", loss_of(net), losses, loss_of(again))


def unfreeze(name: str) -> None:
    for way, factor in FACTORS.items():
        net = network()
        net[0].requires_grad_(False)
        optimizer = OPTIMIZERS[name]([{"params": net[2:].parameters()}, {"params": net[0].parameters()}])
        train(net, optimizer, 800, seed=1)
        before = loss_of(net)
        net[0].requires_grad_(True)
        losses = train(net, optimizer, AFTER, seed=2, factor=factor)
        show(f"{name}, unfrozen, {way}", before, losses, loss_of(net))


if __name__ == "__main__":
    print(f"{'':40} {'before':>8} {'highest':>8} {'after':>8}")
    for each in OPTIMIZERS:
        restart(each)
        unfreeze(each)
