"""Meta-objectives count what they say they count."""

from __future__ import annotations

import math

import pytest
import torch

from learnedopt.meta import OBJECTIVES, WEIGHTINGS, meta_losses


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


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("loss", 2.0), ("ratio", 4.0), ("log", math.log(2.0)), ("log_ratio", math.log(4.0 + 1e-3))],
)
def test_what_each_objective_makes_of_a_loss(objective: str, expected: float) -> None:
    value = meta_losses(torch.tensor([[2.0]]), torch.tensor([-0.5]), objective)
    torch.testing.assert_close(value, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("weighting", "expected"), [("uniform", [2.0, 20.0]), ("linear", [2.5, 25.0]), ("last", [4.0, 40.0])]
)
def test_how_each_weighting_counts_the_steps(weighting: str, expected: list[float]) -> None:
    losses = torch.tensor([[1.0, 10.0], [1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    torch.testing.assert_close(meta_losses(losses, torch.ones(2), "loss", weighting), torch.tensor(expected))


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_weights_sum_to_one_and_never_fall(name: str, steps: int) -> None:
    weights = WEIGHTINGS[name](steps)
    assert weights.shape == (steps,)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights.diff() >= 0).all()


def test_a_step_of_no_weight_may_have_any_loss() -> None:
    losses = torch.tensor([[math.inf], [math.nan], [3.0]])
    assert meta_losses(losses, torch.ones(1), "loss", "last").item() == 3.0
