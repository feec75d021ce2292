"""What differs by rounding leads to the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.data import digits


def trained(rule: str, seed: int, parts: int) -> Tensor:
    """The weights after 100 steps, the gradient of each added up over so many parts of the batch."""
    torch.manual_seed(seed)
    x, y = (values[:1000] for values in digits().train)
    x = x.flatten(1)
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = LearnedOptimizer(network.parameters(), rule=rule, backend="blocked")
    for _ in range(100):
        optimizer.zero_grad()
        for part in range(parts):
            loss = nn.functional.cross_entropy(network(x[part::parts]), y[part::parts]) / parts
            loss.backward()
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in network.parameters()])


@pytest.mark.parametrize("rule", ["default", "light"])
def test_a_batch_and_its_halves_lead_to_the_same_weights(rule: str) -> None:
    """A hard threshold in the bases once made differences of 1e-7 into differences of 1; now they are 1e-3 or less.

    Not everywhere: where a network fits by heart what is random, or has kinks, differences still grow.
    """
    for seed in range(2):
        assert (trained(rule, seed, 1) - trained(rule, seed, 2)).abs().max() <= 1e-2
