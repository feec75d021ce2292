"""Meta-training learns, and can be stopped, continued and trusted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from learnedopt import rules
from learnedopt.meta import (
    Growing,
    Imitation,
    MetaTrainConfig,
    MetaTrainer,
    MetaTrainingError,
    Stages,
    TruncatedBPTT,
    VarianceMixture,
    episodes,
    load_recipe,
)
from learnedopt.rules import AdamLSTMConfig, LSTMConfig, RuleConfig
from learnedopt.tasks import Logistic, Mixture, Quadratics
from tests.meta.support import SMALL_MLP, Broken, assert_same

RULE = LSTMConfig(hidden_size=3)
SHORT = MetaTrainConfig(updates=3, unroll_length=2, horizon=(4, 4), validate_every=2, validation_horizon=4)
# Several episodes of different structure and length under way at once, minibatches, a growing horizon, validations.
MIXED = MetaTrainConfig(
    updates=14,
    unroll_length=3,
    horizon=(3, 12),
    curriculum=Growing(8),
    episodes=2,
    pool=3,
    copies=2,
    objective="log_ratio",
    learning_rate=1e-2,
    clip_norm=1.0,
    validate_every=4,
    validation_copies=2,
    validation_horizon=5,
)
FAMILY = Mixture((SMALL_MLP, Quadratics(dimension=4), Logistic()))


def horizons(trainer: MetaTrainer) -> set[int]:
    generator = Generator().manual_seed(0)
    return {trainer.pool.horizon(generator, trainer.update, trainer.stage) for _ in range(50)}


def test_the_horizon_grows_from_the_shortest() -> None:
    trainer = MetaTrainer(RULE, FAMILY, MIXED)
    assert horizons(trainer) == {3}
    trainer.update = 4
    assert max(horizons(trainer)) in (6, 9)


def test_the_learning_rate_falls_along_half_a_cosine() -> None:
    config = replace(SHORT, updates=4, learning_rate=1.0, final_learning_rate=0.0)
    rates = [record["learning_rate"] for record in MetaTrainer(RULE, Quadratics(dimension=2), config).run()]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_validation_is_the_same_at_every_call_and_leaves_training_alone() -> None:
    trainer = MetaTrainer(RULE, FAMILY, MIXED)
    list(trainer.run(time_limit=0.0))
    before, global_state = copy.deepcopy(trainer.state_dict()), torch.random.get_rng_state()
    scores = {trainer.validate() for _ in range(3)}
    assert len(scores) == 1
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert_same(trainer.state_dict(), before)
    assert all(weight.requires_grad for weight in trainer.rule.parameters())


def test_validation_is_the_mean_of_the_last_tenth_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def unrolled(rule: object, episode: Any, horizon: int, generator: Generator, split: str) -> Any:
        losses = torch.arange(1.0, horizon + 1.0).unsqueeze(1).expand(-1, len(episode.theta))
        return losses, episode

    monkeypatch.setattr(episodes, "unroll", unrolled)
    for horizon, expected in ((40, 38.5), (8, 8.0)):  # the last four; at least one
        trainer = MetaTrainer(RULE, Quadratics(dimension=2), replace(SHORT, validation_horizon=horizon))
        assert trainer.validate() == pytest.approx(expected)


def test_how_often_validation_runs_does_not_change_training() -> None:
    trainers = [
        MetaTrainer(RULE, FAMILY, replace(MIXED, updates=5, validate_every=every)) for every in (1, 5)
    ]  # fmt: skip
    for trainer in trainers:
        list(trainer.run())
    assert_same(trainers[0].outer.weights(), trainers[1].outer.weights())


def test_no_global_random_numbers_are_used() -> None:
    before = torch.random.get_rng_state()
    trainer = MetaTrainer(RULE, FAMILY, MIXED)
    list(trainer.run(time_limit=0.0))
    trainer.best_rule()
    assert torch.equal(torch.random.get_rng_state(), before)


def scripted(trainer: MetaTrainer, scores: list[float]) -> MetaTrainer:
    sequence: Iterator[float] = iter(scores)
    trainer.validate = lambda: next(sequence)  # type: ignore[method-assign]
    return trainer


def test_patience_stops_after_as_many_validations_without_a_better_one() -> None:
    config = replace(SHORT, updates=100, validate_every=2, patience=2)
    trainer = scripted(MetaTrainer(RULE, Quadratics(dimension=2), config), [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.0])
    records = list(trainer.run())
    assert records[-1]["update"] == 12
    assert [record["validation"] for record in records if "validation" in record] == [3.0, 2.0, 2.5, 1.0, 1.0, 1.5]
    assert [record["best"] for record in records if "best" in record] == [3.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    assert trainer.finished
    assert (trainer.best_score, trainer.best_update) == (1.0, 8)


def test_the_best_rule_is_that_of_the_best_validation() -> None:
    config = replace(SHORT, updates=6, validate_every=2, learning_rate=0.1)
    trainer = scripted(MetaTrainer(RULE, Quadratics(dimension=2), config), [math.inf, 1.0, 2.0])
    for record in trainer.run():
        if record["update"] == 4:
            weights = trainer.outer.weights()
    assert_same(dict(trainer.best_rule().state_dict()), weights)
    assert not torch.equal(trainer.rule.get_parameter("readout.bias"), weights["readout.bias"])


def test_windows_without_a_finite_loss_are_skipped_up_to_a_limit() -> None:
    trainer = MetaTrainer(RULE, Broken(), replace(SHORT, updates=50, max_skipped=3))
    weights = trainer.outer.weights()
    records: list[dict[str, Any]] = []
    with pytest.raises(MetaTrainingError, match=r"4 windows had a non-finite.*at update 3 on BrokenTask\(copies=1"):
        records.extend(trainer.run())
    assert len(records) == 3
    assert_same(trainer.outer.weights(), weights)


def test_training_goes_on_around_tasks_that_break() -> None:
    config = replace(SHORT, updates=40, episodes=2, pool=2, learning_rate=1e-2)
    trainer = MetaTrainer(RULE, Broken(share=0.3), config)
    weights = trainer.outer.weights()
    records = list(trainer.run())
    skipped = [task for record in records for task in record.get("skipped", [])]
    assert trainer.skipped == len(skipped)
    assert 0 < len(skipped) < 80
    assert all("BrokenTask(copies=1, broken=True)" in task for task in skipped)
    # One window that breaks does not take the other's gradient away.
    assert any(math.isfinite(record["meta_loss"]) and "skipped" in record for record in records)
    assert not torch.equal(trainer.rule.get_parameter("readout.weight"), weights["readout.weight"])
    assert all(weight.isfinite().all() for weight in trainer.rule.parameters())


def test_a_validation_that_is_not_finite_is_the_worst() -> None:
    assert MetaTrainer(RULE, Broken(), SHORT).validate() == math.inf


@pytest.mark.parametrize("rule", [LSTMConfig(hidden_size=4, preprocessing="identity"), AdamLSTMConfig(hidden_size=4)])
def test_meta_training_lowers_validation_below_the_untrained_rule(rule: RuleConfig) -> None:
    config = MetaTrainConfig(
        updates=40,
        unroll_length=10,
        horizon=(20, 20),
        copies=16,
        objective="log_ratio",
        learning_rate=2e-2,
        validate_every=40,
        validation_horizon=20,
    )
    trainer = MetaTrainer(rule, Quadratics(dimension=4), config)
    untrained = trainer.validate()
    list(trainer.run())
    assert trainer.best_score < untrained - 0.5


def test_second_order_training_runs_and_differs() -> None:
    trainers = [
        MetaTrainer(RULE, SMALL_MLP, replace(SHORT, estimator=TruncatedBPTT(order), learning_rate=1e-2))
        for order in (False, True)
    ]
    first, second = ([record["meta_loss"] for record in trainer.run()] for trainer in trainers)
    assert first[0] == pytest.approx(second[0])
    assert first != second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": 0}, "updates must be at least 1"),
        ({"validation_copies": 0}, "validation_copies must be at least 1"),
        ({"horizon": (20, 10)}, "shortest <= longest"),
        ({"objective": "sum"}, r"unknown objective 'sum'; known: \['log', 'log_ratio', 'loss', 'ratio'\]"),
        ({"weighting": "first"}, r"unknown weighting 'first'; known: \['last', 'linear', 'uniform'\]"),
        ({"split": "all"}, "unknown split 'all'"),
        ({"backend": "cudnn"}, "unknown backend 'cudnn'"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1"),
        ({"curriculum": Stages((10, 20), 1), "patience": 1}, "stages have a patience of their own"),
        ({"estimator": VarianceMixture()}, "at least 2 copies"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"patience": 0}, "patience must be at least 1"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Imitation(share=0.0), "share of imitation must be above 0 and at most 1, got 0.0"),
        (lambda: Imitation(share=1.5), "share of imitation must be above 0 and at most 1, got 1.5"),
        (lambda: Imitation(updates=0), "updates of imitation must be at least 1"),
        (lambda: Stages((0, 20), 1), "stages must be lengths of at least 1"),
        (lambda: Stages((), 1), "stages must be lengths of at least 1"),
        (lambda: Stages((10, 20), 0), "patience must be at least 1"),
        (lambda: Growing(0), "must grow over at least 1 update"),
    ],
)
def test_a_curriculum_or_an_imitation_that_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


RECIPE_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from learnedopt.meta import MetaTrainConfig, Recipe
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Quadratics

@dataclass(frozen=True)
class Narrow(Quadratics):
    width: int = 2

RECIPE = Recipe("mine", "Mine.", "mine", LSTMConfig(), MetaTrainConfig(updates=1), lambda root: Narrow())
"""


def test_a_recipe_is_a_file_and_may_define_its_own_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meta_training").mkdir()
    (tmp_path / "meta_training" / "my_recipe.py").write_text(RECIPE_FILE)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("my-recipe").name == "mine"
    assert load_recipe(tmp_path / "meta_training" / "my_recipe.py").name == "mine"
    with pytest.raises(FileNotFoundError, match=r"no recipe 'other'.*one of \['my_recipe'\]"):
        load_recipe("other")
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match="must define RECIPE"):
        load_recipe("empty.py")


ROOT = Path(__file__).parents[2]
RECIPES, TRIALS = (sorted(ROOT.glob(f"meta_training/{folder}[a-z]*.py")) for folder in ("", "trials/"))


@pytest.mark.parametrize("path", [*RECIPES, *TRIALS], ids=lambda p: p.stem)
def test_every_committed_recipe_can_be_loaded_and_exports_where_it_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))  # a recipe may register a rule of its own
    found = load_recipe(path)
    assert found.name.replace("-", "_") == path.stem
    assert f"meta-train {path.relative_to(ROOT) if path in TRIALS else found.name}" in path.read_text()
