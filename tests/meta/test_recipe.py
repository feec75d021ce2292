"""Recipes: settings replaced on the command line, logs, and rules and tasks from outside the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learnedopt import LearnedOptimizer, zoo
from learnedopt.cli import main
from learnedopt.meta import (
    ES,
    PES,
    AdamTeacher,
    Growing,
    Imitation,
    MetaTrainConfig,
    Recipe,
    SearchConfig,
    SGDTeacher,
    Stages,
    TruncatedBPTT,
    overridden,
)
from learnedopt.rules import RULES, LSTMConfig
from learnedopt.runs import Run
from learnedopt.tasks import Mixture, Quadratics

TINY = Recipe(
    "tiny",
    "A rule for tests.",
    "small problems",
    LSTMConfig(hidden_size=3),
    MetaTrainConfig(updates=4, unroll_length=2, horizon=(4, 4), validate_every=2, validation_horizon=4),
    lambda root: Quadratics(dimension=3),
)
STAGES = Stages((2, 4), 1)
Captured = pytest.CaptureFixture[str]


def test_settings_of_rule_and_training_can_be_replaced() -> None:
    arguments = "--training.updates 7 --training.horizon 10 20 --training.copies auto --rule.hidden-size 5"
    recipe = overridden(TINY, [*arguments.split(), "--training.clip-norm", "0.5"])
    assert recipe.rule == LSTMConfig(hidden_size=5)
    expected = {"updates": 7, "horizon": (10, 20), "copies": "auto", "clip_norm": 0.5}
    assert {name: getattr(recipe.training, name) for name in expected} == expected
    assert isinstance(recipe.training, MetaTrainConfig) and isinstance(TINY.training, MetaTrainConfig)
    assert recipe.training.unroll_length == TINY.training.unroll_length
    assert overridden(TINY, []) is TINY


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("training.estimator:pes --training.estimator.std 0.5", PES(0.5)),
        ("training.estimator:es", ES()),
        ("training.estimator:truncated-bptt --training.estimator.recompute", TruncatedBPTT(recompute=True)),
    ],
)
def test_an_estimator_is_chosen_with_a_colon(arguments: str, expected: TruncatedBPTT | ES | PES) -> None:
    training = overridden(TINY, arguments.split()).training
    assert isinstance(training, MetaTrainConfig) and training.estimator == expected


def test_a_teacher_is_chosen_with_a_colon() -> None:
    arguments = "training.imitation:imitation --training.imitation.share 0.5 "
    adam = overridden(TINY, arguments.split()).training
    assert isinstance(adam, MetaTrainConfig) and adam.imitation == Imitation(AdamTeacher(), share=0.5)
    sgd = overridden(TINY, [*arguments.split(), "training.imitation.teacher:sgd-teacher"]).training
    assert isinstance(sgd, MetaTrainConfig) and sgd.imitation == Imitation(SGDTeacher(), share=0.5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("training.curriculum:growing --training.curriculum.updates 9", Growing(9)),
        ("training.curriculum:stages --training.curriculum.lengths 2 4 --training.curriculum.patience 1", STAGES),
        ("training.curriculum:growing --training.curriculum.updates 9 training.estimator:es", Growing(9)),
    ],
)
def test_a_curriculum_is_chosen_with_a_colon(arguments: str, expected: Growing | Stages) -> None:
    training = overridden(TINY, arguments.split()).training
    assert isinstance(training, MetaTrainConfig) and training.curriculum == expected
    staged = replace(TINY, training=replace(training, curriculum=STAGES))
    shorter = overridden(staged, ["training.curriculum:stages", "--training.curriculum.lengths", "2"]).training
    assert isinstance(shorter, MetaTrainConfig) and shorter.curriculum == Stages((2,), 1)
    none = overridden(staged, ["training.curriculum:none"]).training
    assert isinstance(none, MetaTrainConfig) and none.curriculum is None


@pytest.mark.parametrize(
    "arguments",
    [
        "--training.estimator.std 0.02 --training.updates 7 training.estimator:pes",
        "training.estimator:pes --training.updates 7 --training.estimator.std 0.02",
        "training.imitation.teacher:sgd-teacher --training.estimator.std 0.02 training.imitation:imitation "
        "training.estimator:pes --training.updates 7",
    ],
)
def test_settings_come_in_any_order(arguments: str) -> None:
    training = overridden(TINY, arguments.split()).training
    assert isinstance(training, MetaTrainConfig)
    assert (training.updates, training.estimator) == (7, PES(std=0.02))


@pytest.mark.parametrize("arguments", ["--training.updtes 7", "--training.updates many", "training.estimator:adam"])
def test_a_setting_that_does_not_exist_is_an_error(arguments: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        overridden(TINY, arguments.split())
    assert raised.value.code == 2
    assert "training" in capsys.readouterr().err


@pytest.mark.parametrize(
    "training",
    [
        TINY.training,
        SearchConfig(
            updates=1,
            coordinates=(("readout.bias[0]", 0.0, 0.1), ("readout.weight[0,0]", 0.0, 0.1)),
            population=4,
            horizon=6,
        ),
    ],
)
def test_training_goes_on_from_an_entry_of_the_zoo(training: MetaTrainConfig | SearchConfig, tmp_path: Path) -> None:
    """The weights, and nothing of how they were made."""
    first = Run(TINY, tmp_path / "first")
    list(first.run())
    entry = first.export(tmp_path / "zoo")
    family = Mixture((Quadratics(dimension=3),))
    recipe = replace(TINY, name="tuned", start=str(entry.path), training=training, family=lambda root: family)
    run = Run(recipe, tmp_path / "run")
    loaded = zoo.load_rule(entry.path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in run.trainer.rule.state_dict().items())
    list(run.run())
    tuned = run.export(tmp_path / "zoo")
    assert tuned.meta_training["start"] == str(entry.path)
    after = zoo.load_rule(tuned.path).state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, loaded[name])]
    assert (
        moved == ["readout.weight", "readout.bias"] if isinstance(training, SearchConfig) else len(moved) == len(loaded)
    )
    again = Run(recipe, tmp_path / "run")
    assert again.trainer.finished
    with pytest.raises(ValueError, match="began with other weights"):
        Run(replace(recipe, start=""), tmp_path / "run")


def test_what_training_began_with_is_kept_if_it_is_better(tmp_path: Path) -> None:
    assert isinstance(TINY.training, MetaTrainConfig)
    first = Run(TINY, tmp_path / "first")
    list(first.run())
    entry = first.export(tmp_path / "zoo")
    wild = replace(TINY.training, learning_rate=1e3)
    run = Run(replace(TINY, name="wild", start=str(entry.path), training=wild), tmp_path / "run")
    list(run.run())
    assert run.trainer.best_update == 0 and run.trainer.update == 4
    kept = run.export(tmp_path / "zoo")
    for one, other in zip(zoo.load_rule(kept.path).parameters(), zoo.load_rule(entry.path).parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_entry_of_other_settings_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny cannot begin with mnist-mlp, .*\(hidden_size.*entry_info\(NAME\)"):
        Run(replace(TINY, start="mnist-mlp"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises((ValueError, SystemExit)):
        overridden(TINY, ["--training.updates", "0"])


def test_what_was_resolved_is_saved_with_the_run_and_with_the_entry(tmp_path: Path) -> None:
    recipe = overridden(TINY, ["--training.copies", "3", "training.estimator:es", "--training.estimator.std", "0.25"])
    run = Run(recipe, tmp_path / "run")
    list(run.run())
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["training"]["estimator"] == {"kind": "es", "std": 0.25}
    assert (saved["copies"], saved["processes"], saved["backend"], saved["device"]) == (3, 1, "reference", "cpu")
    entry = run.export(tmp_path / "zoo")
    assert entry.meta_training["settings"]["estimator"] == {"kind": "es", "std": 0.25}
    assert entry.meta_training["settings"]["copies"] == 3


@pytest.mark.parametrize("teacher", [AdamTeacher(), SGDTeacher(decay_steps=3.0)], ids=["constant", "falling"])
def test_what_had_a_teacher_can_be_exported(teacher: AdamTeacher | SGDTeacher, tmp_path: Path) -> None:
    assert isinstance(TINY.training, MetaTrainConfig)
    training = replace(TINY.training, imitation=Imitation(teacher, share=0.5))
    run = Run(replace(TINY, training=training), tmp_path / "run")
    list(run.run())
    settings = run.export(tmp_path / "zoo").meta_training["settings"]
    assert settings["imitation"]["teacher"]["decay_steps"] == teacher.decay_steps


OUTSIDE = '''
"""A rule, a task and a recipe that the package knows nothing of."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from learnedopt.meta import MetaTrainConfig, Recipe
from learnedopt.rules import RULES, RuleConfig, StateSpec, UpdateRule
from learnedopt.tasks import Task, TaskFamily


@dataclass(frozen=True)
class MomentumConfig(RuleConfig):
    kind: ClassVar[str] = "my-momentum"
    decay: float = 0.9


class Momentum(UpdateRule):
    """Momentum with a learned step size."""
    config_class = MomentumConfig

    def __init__(self, config):
        super().__init__(config)
        self.log_step = torch.nn.Parameter(torch.tensor(-6.0))

    def state_spec(self):
        return {"momentum": StateSpec()}

    def forward(self, param, grad, state, statistics):
        momentum = self.config.decay * state["momentum"] + grad
        return -self.log_step.exp() * momentum, {"momentum": momentum}


RULES["my-momentum"] = Momentum


class Fit(Task):
    """A line through points."""
    def __init__(self, copies):
        self.copies = copies

    def init(self, generator):
        return {"line": torch.randn(self.copies, 2, generator=generator)}

    def sample(self, generator, split="train"):
        x = torch.randn(self.copies, 16, generator=generator)
        return x, 3.0 * x - 1.0

    def loss(self, params, batch):
        x, y = batch
        slope, offset = params["line"].unbind(-1)
        return (slope * x + offset - y).square().mean()


class Fits(TaskFamily):
    def draw(self, generator, copies):
        return Fit(copies)


RECIPE = Recipe(
    name="mine", description="My momentum.", tasks="lines", rule=MomentumConfig(decay=0.8),
    training=MetaTrainConfig(updates=60, horizon=(20, 20), copies=4, learning_rate=0.1, validate_every=30),
    family=lambda root: Fits(),
)
'''


@pytest.mark.parametrize("estimator", ["", "training.estimator:pes", "training.estimator:variance-mixture"])
def test_a_rule_and_a_task_from_outside_train_by_the_same_command(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OUTSIDE)
    try:
        assert main(["meta-train", "mine.py", "--export", "zoo", "--training.seed", "1", *estimator.split()]) == 0
        rule = zoo.load_rule(tmp_path / "zoo" / "mine")
        assert rule.get_parameter("log_step").item() > -5.0
        weights = torch.nn.Parameter(torch.ones(2))
        optimizer = LearnedOptimizer([weights], rule=rule)
        weights.square().sum().backward()
        optimizer.step()
        assert (weights < 1.0).all()
    finally:
        RULES.pop("my-momentum", None)
    with pytest.raises(ValueError, match="unknown rule kind 'my-momentum'"):
        zoo.load_rule(tmp_path / "zoo" / "mine")
    assert "best validation" in capsys.readouterr().out


def test_the_settings_of_a_recipe_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OUTSIDE)
    try:
        with pytest.raises(SystemExit) as raised:
            main(["meta-train", "mine.py", "--settings"])
    finally:
        RULES.pop("my-momentum", None)
    assert raised.value.code == 0
    output = capsys.readouterr().out
    assert "--rule.decay" in output
    assert "--training.unroll-length" in output
    assert not (tmp_path / "runs").exists()


def test_other_commands_take_no_settings(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["zoo", "list", "--training.updates", "3"])
    assert raised.value.code == 2
    assert "unrecognized arguments: --training.updates 3" in capsys.readouterr().err


def test_checkpoints_are_a_number_of_updates_apart() -> None:
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        replace(TINY, checkpoint_every=0)
