"""Scores, on records made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from learnedopt.evaluation.records import Record
from learnedopt.evaluation.report import _losses
from learnedopt.evaluation.scores import (
    TAUS,
    Entry,
    Results,
    bootstrap_tasks,
    interquartile_mean,
    losses_of,
    paired_test,
    performance_profile,
    profile_score,
    steps_needed,
)

TASKS = ("siren", "vae")
SEEDS = 6
AT = [0, 50, 100]
RULE, ADAM, TUNED = Entry("rule", False), Entry("adam", False), Entry("adam", True)


def common(contender: str, task: str) -> Record:
    return {
        "task": task,
        "contender": contender,
        "identity": contender,
        "learned": contender == "rule",
        "anytime": True,
        "default": {"lr": 1.0, "weight_decay": None},
        "horizon": 100,
        "session": "s",
    }


def run(contender: str, task: str, middle: float, final: list[float], lr: float = 1.0, **more: Any) -> Record:
    losses = [[4.0, middle, value if np.isfinite(value) else None] for value in final]
    return {
        "kind": "run",
        **common(contender, task),
        "setting": {"lr": lr, "weight_decay": None},
        "steps": 100,
        "seeds": {"role": "reporting", "copies": len(final)},
        "parameters": 3,
        "diverged": [None if np.isfinite(value) else 90 for value in final],
        "at": AT,
        "losses": losses,
        "held_out_at": AT,
        "held_out": losses,
        "accuracy": None,
        **more,
    }


def sweep(task: str) -> Record:
    """Adam at two learning rates: one is faster at first and stays at 1, the other gets to 0.1 at step 400."""
    return {
        "kind": "sweep",
        **common("adam", task),
        "steps": 400,
        "seeds": {"role": "selection", "copies": 2},
        "settings": [{"lr": 2.0, "weight_decay": None}, {"lr": 1.0, "weight_decay": None}],
        "at": [100, 400],
        "final": [[[1.0, 1.0], [1.0, 1.0]], [[3.0, 2.0], [0.1, 0.1]]],
        "curves_at": [0, 100, 200, 400],
        "curves": [[4.0, 1.0, None, None], [4.0, 2.0, 0.5, 0.1]],
    }


def records(**more: Any) -> list[Record]:
    found: list[Record] = [{"kind": "session", "id": "s"}]
    for task in TASKS:
        found.append(sweep(task))
        found.append({"kind": "cost", **common("adam", task), "gradient_ms": 3.0, "optimizer_ms": 1.0})
        found.append({"kind": "cost", **common("rule", task), "gradient_ms": 3.0, "optimizer_ms": 5.0})
        found.append(run("adam", task, 3.0, [2.5] * SEEDS))
        found.append(run("adam", task, 2.0, [1.0] * SEEDS, lr=2.0))
    found.append(run("rule", "siren", 1.0, [0.75] * SEEDS, **more))
    found.append(run("rule", "vae", 1.2, [1.5, 1.5, 1.5, 1.5, 1.6, np.inf], **more))
    return found


@pytest.fixture
def results() -> Results:
    return Results(records())


def test_adam_is_tuned_by_its_sweep(results: Results) -> None:
    tuned = results.setting("siren", TUNED, 100)
    assert tuned is not None and tuned.lr == 2.0
    assert results.entries == [RULE, ADAM, TUNED]
    assert results.horizons == [100]


def test_the_envelope_is_the_lowest_that_any_rate_has_reached(results: Results) -> None:
    envelope = results.envelope("siren")
    assert envelope is not None
    assert [part.tolist() for part in envelope] == [[0, 100, 200, 400], [4.0, 1.0, 0.5, 0.1]]


def test_the_speed_up_compares_steps_for_the_same_loss(results: Results) -> None:
    # 0.75 lies half way between 1.0 at step 100 and 0.5 at step 200.
    speedup = results.speedup("siren", RULE, 100)
    assert speedup is not None and speedup.tolist() == pytest.approx([1.5] * SEEDS)
    assert results.speedup_limit("siren", 100) == 4.0


def test_a_diverged_run_counts_as_infinite_and_is_not_dropped(results: Results) -> None:
    final, speedup = results.final("vae", RULE, 100), results.speedup("vae", RULE, 100)
    assert final is not None and speedup is not None
    assert len(final) == SEEDS and np.isinf(final[-1]) and speedup[-1] == 0.0
    assert results.diverged(RULE, 100) == 1
    steps, best = results.steps_to_target("vae", RULE, 100), results.best("vae", RULE, 100)
    assert best is not None and np.isinf(best[-1])
    assert steps is not None and np.isinf(steps[-1]), "though it was there before it diverged"


def test_what_is_not_reached_by_adam_counts_as_all_that_adam_was_given() -> None:
    found = records()
    found[-2]["losses"] = [[4.0, 1.0, 0.01]] * SEEDS
    speedup = Results(found).speedup("siren", RULE, 100)
    assert speedup is not None and speedup.tolist() == [4.0] * SEEDS


def test_comparisons_count_tasks_and_say_which_are_sure(results: Results) -> None:
    against_default, against_tuned = (results.compare(RULE, other, 100) for other in (ADAM, TUNED))
    assert against_default is not None and against_tuned is not None
    assert (against_default.better, against_default.tasks) == (2, 2)
    assert (against_default.surely_better, against_default.surely_worse) == (1, 0)
    assert (against_tuned.better, against_tuned.surely_better, against_tuned.surely_worse) == (1, 1, 1)
    ((task, factor),) = losses_of(results, RULE, TUNED, 100)
    assert task == "vae" and factor == pytest.approx(1.5)


def test_a_task_on_which_half_of_the_runs_diverge_is_lost_by_no_factor() -> None:
    found = records()
    for record in found:
        if record["kind"] == "run" and record["task"] == "vae" and record["contender"] == RULE.contender:
            record["losses"] = [[*row[:-1], None] for row in record["losses"]]
    results = Results(found)
    assert list(losses_of(results, RULE, TUNED, 100)) == [("vae", np.inf)]
    assert any("above it on 1 of 2: vae (diverged);" in line for line in _losses(results, 100))


def test_losses_may_be_negative() -> None:
    """As log likelihoods are: targets stay above what is lowest, and there are no ratios."""
    found = records()
    for record in found:
        if record["kind"] == "run":
            for key in ("losses", "held_out"):
                record[key] = [[value if value is None else value - 10.0 for value in row] for row in record[key]]
    results = Results(found)
    target = results.target("siren", 100, held_out=True)
    assert target is not None and -9.0 < target < -8.8
    reached = results.steps_to_target("siren", TUNED, 100, held_out=True)
    assert reached is not None and np.isfinite(reached).all()
    comparison = results.compare(RULE, TUNED, 100)
    assert comparison is not None and (comparison.better, comparison.p) == (1, 1.0)
    assert list(losses_of(results, RULE, TUNED, 100)) == [("vae", None)]


def test_of_two_sweeps_the_last_counts_for_the_envelope_too() -> None:
    newer = [sweep(task) | {"curves": [[4.0, 0.9, 0.9, 0.9], [4.0, 2.0, 0.4, 0.05]]} for task in TASKS]
    envelope = Results([*records(), *newer]).envelope("siren")
    assert envelope is not None and envelope[1].tolist() == [4.0, 0.9, 0.4, 0.05]


def test_seconds_are_steps_times_their_cost(results: Results) -> None:
    # The target is tuned Adam's loss at three quarters, measured at the next checkpoint: 1.0.
    steps, seconds = (f("siren", RULE, 100) for f in (results.steps_to_target, results.seconds_to_target))
    assert steps is not None and seconds is not None
    assert steps.tolist() == [50.0] * SEEDS
    assert seconds.tolist() == pytest.approx([0.4] * SEEDS)


def test_profiles_are_of_medians_over_seeds(results: Results) -> None:
    profile = results.profile([RULE, TUNED], 100)
    # siren: 50 steps against 100; vae: the rule never gets to 1.0, Adam does at step 100.
    assert profile[0].tolist() == [0.5] * len(TAUS)
    assert profile[1, 0] == 0.5 and profile[1, TAUS.searchsorted(2.01)] == 1.0
    assert profile_score(profile)[0] == pytest.approx(0.5)


def test_newer_weights_replace_older_ones() -> None:
    found = [*records(), run("rule", "siren", 1.0, [0.25] * SEEDS, identity="newer")]
    results = Results(found)
    final = results.final("siren", RULE, 100)
    assert final is not None and final.tolist() == [0.25] * SEEDS
    assert results.final("vae", RULE, 100) is None and results.mean_speedup(RULE, 100) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 50}, "different horizons or numbers of seeds"),
        ({"losses": [[5.0, 1.0, 1.0]] * SEEDS}, "start from different losses: they are not paired"),
    ],
)
def test_runs_that_cannot_stand_beside_each_other_are_refused(change: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Results(records(**change))


def test_without_runs_there_is_nothing_to_report() -> None:
    with pytest.raises(ValueError, match="there are no runs"):
        Results([])


@pytest.mark.parametrize(
    ("loss", "steps"),
    [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (1.0, 20.0), (0.9, np.inf), (np.inf, 0.0)],
)
def test_steps_needed(loss: float, steps: float) -> None:
    assert steps_needed(np.array([0.0, 10.0, 20.0]), np.array([4.0, 2.0, 1.0]), loss) == steps


@given(npst.arrays(np.float64, st.integers(1, 12), elements=st.floats(-100, 100)))
def test_the_interquartile_mean_is_that_of_a_fourfold_sample(values: np.ndarray) -> None:
    repeated = np.sort(np.repeat(values, 4))
    quarter = len(values)
    assert interquartile_mean(values) == pytest.approx(repeated[quarter:-quarter].mean(), abs=1e-9)


def test_the_interquartile_mean_survives_infinite_tails() -> None:
    assert interquartile_mean(np.array([-np.inf, 1.0, 2.0, np.inf])) == 1.5


def test_the_bootstrap_covers_what_it_should() -> None:
    generator = np.random.default_rng(0)
    values = 2.0 + generator.normal(size=(12, 1)) + 0.1 * generator.normal(size=(12, 10))
    estimate = bootstrap_tasks(values)
    assert estimate.low < estimate.value < estimate.high
    assert 0.5 < estimate.high - estimate.low < 3.0
    assert bootstrap_tasks(values) == estimate
    assert bootstrap_tasks(np.full((5, 3), 1.5)).low == 1.5


def test_a_task_that_nobody_finishes_counts_for_nobody() -> None:
    profile = performance_profile(np.array([[1.0, np.inf], [3.0, np.inf]]))
    assert profile[:, -1].tolist() == [0.5, 0.5] and profile[:, 0].tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("ours", "theirs", "sure"),
    [
        (np.arange(10.0), np.arange(10.0) + 1, True),
        (np.arange(10.0), np.arange(10.0), False),
        (np.full(10, np.inf), np.full(10, np.inf), False),
        (np.full(10, np.inf), np.arange(10.0), True),
        (np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0]), False),
    ],
)
def test_paired_tests(ours: np.ndarray, theirs: np.ndarray, sure: bool) -> None:
    assert (paired_test(ours, theirs) < 0.05) == sure
    assert paired_test(ours, theirs) == paired_test(theirs, ours)
