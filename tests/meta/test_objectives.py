"""Meta-objectives count what they say they count."""

from __future__ import annotations

import math

import pytest
import torch

from learnedopt.meta import OBJECTIVES


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e4])
def test_log_ratio_does_not_see_the_scale_of_a_loss(scale: float, generator: torch.Generator) -> None:
    losses = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    initial = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    scales = torch.tensor([1.0, scale, 1 / scale], dtype=torch.float64)
    objective = OBJECTIVES["log_ratio"]
    torch.testing.assert_close(objective(losses * scales, initial * scales), objective(losses, initial))


def test_log_ratio_counts_a_factor_alike_everywhere() -> None:
    objective, initial = OBJECTIVES["log_ratio"], torch.ones(1)
    fall = [objective(torch.tensor([[ratio]]), initial) - objective(torch.tensor([[ratio / 2]]), initial)
            for ratio in (8.0, 1.0, 0.5)]  # fmt: skip
    assert [round(value.item(), 2) for value in fall] == [round(math.log(2), 2)] * 3


def test_a_diverging_copy_and_a_negative_loss_are_bounded() -> None:
    objective, initial = OBJECTIVES["log_ratio"], torch.ones(1)
    assert objective(torch.tensor([[1e30]]), initial) == objective(torch.tensor([[20.0]]), initial)
    assert objective(torch.tensor([[-5.0]]), initial) == pytest.approx(math.log(1e-3))


def test_mean_weighs_every_step_and_copy_alike(generator: torch.Generator) -> None:
    losses = torch.rand(4, 3, generator=generator)
    assert OBJECTIVES["mean"](losses, torch.ones(3)) == pytest.approx(losses.sum().item() / 12)
