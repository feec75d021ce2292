"""Tuning learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from benchmarks.harness.baselines import BASELINES, GRID, Criterion, tune
from benchmarks.harness.runs import run_problems
from learnedopt.tasks import Quadratics


def test_the_grid_has_enough_learning_rates() -> None:
    assert len(GRID) >= 14
    assert list(GRID) == sorted(GRID)


def test_tuning_finds_the_known_optimum() -> None:
    """On ``|W theta - y|^2`` in one dimension, gradient descent with lr = 1 / (2 W^2) is done in one step."""

    class One(Quadratics):
        def draw(self, generator: torch.Generator, copies: int):  # type: ignore[no-untyped-def]
            task = super().draw(generator, copies)
            task.matrix.fill_(2.0)  # type: ignore[attr-defined]
            return task

    def score(lr: float) -> float:
        result = run_problems(One(dimension=1), lambda params: BASELINES["sgd"](params, lr), 4, 3, 0, stacked=True)
        return Criterion(3)(result.losses)

    tuned = tune(score)
    assert tuned.lr == 1 / 8
    assert tuned.scores[1 / 8] == pytest.approx(0, abs=1e-10)
    assert tuned.scores[16.0] == math.inf
    assert list(tuned.scores) == list(GRID)
    assert not tuned.at_edge


@pytest.mark.parametrize("exponent", [-14, 9])
def test_the_grid_grows_until_the_best_is_inside(exponent: int) -> None:
    tuned = tune(lambda lr: abs(math.log2(lr) - exponent))
    assert tuned.lr == 2.0**exponent
    assert not tuned.at_edge
    assert len(tuned.scores) == len(GRID) + (5 if exponent < 0 else 6)


def test_a_best_that_stays_at_the_edge_is_reported() -> None:
    tuned = tune(lambda lr: -lr, extensions=3)
    assert tuned.at_edge
    assert tuned.lr == GRID[-1] * 8


def test_failed_runs_never_win() -> None:
    scores = {0.1: math.nan, 0.2: math.inf, 0.4: 5.0, 0.8: math.inf}
    assert tune(scores.__getitem__, grid=list(scores)).lr == 0.4


def test_of_equal_scores_the_smallest_learning_rate_counts() -> None:
    assert tune(lambda lr: float(not 0.1 < lr < 1)).lr == 0.125


@pytest.mark.parametrize("grid", [(), (0.1,), (0.2, 0.1), (0.1, 0.1), (0.0, 0.1), (-1.0, 1.0)])
def test_a_grid_that_makes_no_sense_is_rejected(grid: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        tune(lambda lr: lr, grid=grid)


def test_the_criterion_averages_the_last_steps_up_to_its_own() -> None:
    losses = torch.arange(6.0)[:, None] * torch.tensor([1.0, 10.0, 100.0])
    assert Criterion(3)(losses) == pytest.approx(3 * 37)
    assert Criterion(3, statistic="median")(losses) == 30
    assert Criterion(3, window=3, statistic="median")(losses) == 20
    assert Criterion(5, window=6).values(losses).tolist() == [2.5, 25, 250]


def test_the_criterion_is_infinite_with_diverged_runs() -> None:
    losses = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, math.inf, math.inf]])
    assert Criterion(1)(losses) == math.inf
    assert Criterion(1, statistic="median")(losses[:, :3]) == 2
    assert Criterion(1, statistic="median")(losses) == math.inf
    assert Criterion(1, statistic="median")(losses[:, 2:]) == math.inf


@pytest.mark.parametrize("window", [0, 5])
def test_a_window_longer_than_the_run_is_rejected(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        Criterion(3, window=window)


def test_an_unknown_statistic_is_rejected() -> None:
    with pytest.raises(ValueError, match="statistic"):
        Criterion(3, statistic="mode")  # type: ignore[arg-type]
