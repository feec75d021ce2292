"""Runs begun by the code of before go on, and end as they would have ended there: ``tests/fixtures/runs``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt.fewshot import MLP, EpisodeShape, FewShotRecipe, FewShotTrainConfig
from learnedopt.fewshot.learners import MAMLConfig
from learnedopt.meta import (
    AdamTeacher,
    Growing,
    Imitation,
    MetaTrainConfig,
    Recipe,
    SearchConfig,
    SGDTeacher,
    Stages,
)
from learnedopt.meta.config import from_flat
from learnedopt.rules import LSTMConfig, RuleConfig, ScheduleFreeConfig
from learnedopt.rules.legacy import modern_training
from learnedopt.runs import Run
from learnedopt.tasks import Mixture, Quadratics, TaskFamily

FIXTURES = Path(__file__).parents[1] / "fixtures" / "runs"
RULE = LSTMConfig(hidden_size=2)
SHARED: dict[str, Any] = {
    "unroll_length": 2,
    "episodes": 2,
    "pool": 3,
    "copies": 2,
    "clip_norm": 1.0,
    "validate_every": 4,
    "validation_copies": 2,
    "validation_horizon": 5,
}
GROWING = MetaTrainConfig(
    updates=14,
    horizon=(2, 8),
    curriculum=Growing(8),
    objective="log_ratio",
    ema_decay=0.9,
    imitation=Imitation(SGDTeacher(lr=0.05), share=0.4, updates=10),
    patience=3,
    learning_rate=1e-2,
    **SHARED,
)
STAGED = MetaTrainConfig(
    updates=40,
    curriculum=Stages((2, 4, 8), patience=1),
    imitation=Imitation(AdamTeacher(), share=0.3),
    learning_rate=0.3,
    **SHARED,
)
SEARCH = SearchConfig(
    updates=4,
    coordinates=(("modulator.readout.bias[0]", 0.0, 0.5), ("modulator.readout.bias[3]", 0.0, 0.5)),
    population=6,
    horizon=24,
)
SHAPE = EpisodeShape(shots=3, queries=4)
SINE = FewShotRecipe(
    "fewshot",
    "MAML for tests",
    "sinusoid",
    MAMLConfig(learning_rate=0.01),
    MLP(hidden=(6,)),
    SHAPE,
    SHAPE,
    FewShotTrainConfig(9, 2, schedule="cosine", validate_every=3, validation_episodes=5, checkpoint_every=2),
)


def recipe(name: str, rule: RuleConfig, training: MetaTrainConfig | SearchConfig, family: TaskFamily) -> Recipe:
    return Recipe(name, "A rule for tests.", "quadratics", rule, training, lambda root: family, checkpoint_every=4)


RECIPES: tuple[Any, ...] = (
    recipe("growing", RULE, GROWING, Quadratics(dimension=3)),
    recipe("staged", RULE, STAGED, Quadratics(dimension=3)),
    recipe(
        "search",
        ScheduleFreeConfig(nominal_step=1e-4),
        SEARCH,
        Mixture((Quadratics(dimension=3), Quadratics(dimension=5))),
    ),
    SINE,
)


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """The same, except for seconds, and for what another processor rounds otherwise."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs.keys() - {"seconds"}:
            assert_alike(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs)):
            assert_alike(*pair, f"{where}/{index}")
    elif isinstance(theirs, Tensor) and theirs.is_floating_point():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), where
    else:
        assert ours == theirs, where


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of whole updates: version 0.1 knew no others."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "part" not in record]


def as_now(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a trainer, from a checkpoint of then or of now."""
    trainer = modern_training(state.get("trainer", state))
    trainer.pop("commit", None)
    if "config" in trainer:
        trainer["config"] = from_flat(trainer["config"])
    return trainer


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_run_of_before_goes_on_to_its_end(recipe: Any, tmp_path: Path) -> None:
    golden = FIXTURES / recipe.name
    shutil.copytree(golden / "halfway", folder := tmp_path / "run")
    run = Run(recipe, folder)
    assert run.trainer.done == len(lines(golden / "halfway")) > 0 and not run.trainer.finished
    assert run.commit == "3e08385b5de831863ca176ef591b3a4e6c50b849"
    for _ in run.run():
        pass
    assert run.trainer.finished
    ours, theirs = (as_now(torch.load(path / "checkpoint.pt", weights_only=True)) for path in (folder, golden / "end"))
    assert_alike(ours, theirs)
    assert_alike(lines(folder), lines(golden / "end"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_run_from_the_beginning_is_that_of_before(recipe: Any, tmp_path: Path) -> None:
    for _ in Run(recipe, tmp_path).run():
        pass
    assert_alike(lines(tmp_path), lines(FIXTURES / recipe.name / "end"))


@pytest.mark.parametrize("training", [GROWING, STAGED], ids=["growing", "staged"])
def test_settings_of_then_are_those_of_now(training: MetaTrainConfig) -> None:
    name = "growing" if training is GROWING else "staged"
    written = json.loads((FIXTURES / name / "halfway" / "config.json").read_text())["training"]
    assert from_flat(written) == json.loads(json.dumps(training.to_dict()))


def test_settings_without_curriculum_and_imitation_have_none() -> None:
    training = MetaTrainConfig(updates=3, patience=2)
    now = training.to_dict()
    then = {name: value for name, value in now.items() if name != "curriculum"}
    then |= {"curriculum_updates": 0, "stages": (), "imitation_share": 0.0, "imitation_updates": None}
    assert from_flat(then) == from_flat(now) == now
