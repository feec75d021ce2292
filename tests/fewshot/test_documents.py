"""What ``docs/fewshot.md`` and the benchmark say holds."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fewshot import (
    SINUSOID,
    TABLES,
    Row,
    Table,
    as_row,
    image_results,
    image_table,
    on_features,
    runs,
    sinusoid_table,
    summary,
    train,
)
from learnedopt.fewshot import (
    BACKBONES,
    DATASETS,
    LEARNERS,
    BackboneConfig,
    ClassSet,
    Conv4,
    EpisodeList,
    EpisodeShape,
    Evaluation,
    FewShotRecipe,
    FewShotTask,
    FewShotTrainConfig,
    LearnerShape,
    evaluate,
    learner_info,
    list_learners,
    load_recipes,
    load_split,
)
from learnedopt.fewshot.datasets import split_names
from learnedopt.fewshot.learners import (
    ANILConfig,
    FinetuneConfig,
    MAMLConfig,
    MatchingConfig,
    NearestNeighbourConfig,
    ProtoNetConfig,
)
from learnedopt.fewshot.learners.finetune import Finetune
from learnedopt.fewshot.sources import PARTS
from learnedopt.runs import Run

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "fewshot.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_of_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    exec(BLOCKS[0], {})
    assert re.fullmatch(r"[\d.]+ ± [\d.]+ %\n", capsys.readouterr().out)


def test_the_example_of_an_own_backbone_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BACKBONES, "small", BackboneConfig)  # and away again afterwards
    names: dict[str, Any] = {}
    exec(BLOCKS[1], names)
    assert len(BLOCKS) == 2
    learner = names["learner"]
    assert learner.backbone == names["Small"](width=8) and learner.config.normalization == "support"
    assert learner.fit(torch.rand(5, 1, 28, 28), torch.arange(5)).predict(torch.rand(1, 1, 28, 28)).shape == (1, 5)


@pytest.mark.parametrize("name", list_learners())
def test_cards_say_first_what_a_learner_has_as_it_is_loaded(name: str) -> None:
    entry = learner_info(name)
    if entry.learner.normalization == "transductive":
        start = " ".join(entry.card.split("\n\n")[1].split())
        assert re.match(
            r"\*\*As it is loaded, [\d.]+( ± [\d.]+)? % on \d+ ways and \d shots?\*\*: with the batch stat", start
        )
        assert f'load_learner("{name}", "transductive")' in start


def test_the_guide_names_every_method_and_data_set() -> None:
    assert [name for name in (*LEARNERS, *DATASETS) if f"`{name}`" not in TEXT] == []


@pytest.mark.parametrize("name", split_names())
def test_the_guide_knows_how_large_splits_are(name: str) -> None:
    sizes = " / ".join(str(len(load_split(name).class_names(part))) for part in PARTS)
    assert f"| `{name}` | {sizes}" in TEXT


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_row_of_the_benchmark_has_its_recipe_and_figures(table: Table) -> None:
    recipes = load_recipes(ROOT / "meta_training" / "fewshot")
    for row in table.rows:
        for figures in (row.published, row.reproduced, row.targets):
            assert len(figures) in (0, len(table.settings))
        assert row.recipes.keys() <= set(table.settings)
        for ways, shots in row.recipes:
            recipe = recipes[row.recipes[ways, shots]]
            shape = LearnerShape((1, 28, 28), ways, num_classes=5)
            assert recipe.test.ways == ways or recipe.learner.build(recipe.backbone, shape).any_ways
    assert {name for _, name in SINUSOID} <= recipes.keys()
    assert len({row.label for row in table.rows}) == len(table.rows)


def test_tables_hold_what_was_measured_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    accuracy = summary(Evaluation("accuracy", (0.96, 0.98), 0, transductive=True))
    error = summary(Evaluation("mse", (1.0, float("inf")), 1, transductive=False))
    run = {"step": 7, "steps": 9, "seconds": 3, "seed": 0}
    maml = {"label": "MAML, transductive", "setting": "5-way 1-shot", "recipe": "omniglot-maml-5way-1shot"}
    lstm = {"label": "meta-LSTM", "setting": "5-way 1-shot", "recipe": "omniglot-meta-lstm-5way-1shot"}
    baseline = {"label": "baseline-finetune", "setting": "5-way 1-shot", "recipe": "omniglot-finetune"}
    sine = {"label": "MAML", "setting": "5-shot, 1 step(s)", "recipe": "sinusoid-maml"}
    results = {
        "command": "this",
        "torch": "2",
        "entries": {
            "a": {**maml, **run, **accuracy, "step": 9},
            "b": {**maml, **run, **accuracy, "step": 9, "mean": 0.99},
            "d": {**lstm, **run, **accuracy},
            "e": {**baseline, **run, **accuracy, "mean": 0.975, "episodes": "0.98 1"},
            "c": {**sine, **run, **error},
        },
    }
    table = image_table(TABLES["omniglot"], results)
    assert "| MAML, transductive | 5-way 1-shot | 98.00 ± 1.96, sd 1.41 (2 seeds) | 0.10 | yes | 98.7 ± 0.4 |" in table
    assert "| meta-LSTM | 5-way 1-shot | 97.00 ± 1.96 | 0.50 | yes |" in table, "below the baseline"
    assert "| baseline-finetune | 5-way 1-shot | 97.50 ± 1.96 |  | yes |" in table
    assert "| meta-LSTM | 5-way 1-shot | -2.00 ± 0.00 |  |  |  |" in table, "on the same two episodes"
    assert "train omniglot-maml-5way-1shot --root DIR --steps" in table
    assert " omniglot-meta-lstm-5way-1shot " in table, "short, and to be gone on with"
    assert "| MAML, transductive | 5-way 5-shot | not trained yet |" in table and " omniglot-maml-5way-5shot " in table
    assert "| MAML | 5-shot, 1 step(s) | not finite | not finite | 1 | 2 | 7 of 9 |" in sinusoid_table(results)


def test_what_was_judged_on_more_episodes_is_compared_on_the_common_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = {"step": 9, "steps": 9, "seconds": 3, "seed": 0, "setting": "5-way 1-shot"}
    longer = summary(Evaluation("accuracy", (0.95,) * 600 + (1.0,) * 600, 0, transductive=True))
    shorter = summary(Evaluation("accuracy", (0.96,) * 600, 0, transductive=True))
    entries = {
        "a": {**run, **longer, "label": "MAML, transductive", "recipe": "omniglot-maml-5way-1shot"},
        "b": {**run, **longer, "label": "meta-LSTM", "recipe": "omniglot-meta-lstm-5way-1shot"},
        "c": {**run, **shorter, "label": "baseline-finetune", "recipe": "omniglot-finetune"},
    }
    table = image_table(TABLES["omniglot"], {"command": "this", "torch": "2", "entries": entries})
    assert "| MAML, transductive | yes | 95.00 (short by 0.60) |" in table, "of what is published, on all episodes"
    assert "| MAML, transductive | 5-way 1-shot | 97.50 ± 0.14 (1200 episodes) | 0.60 |" in table
    assert "| meta-LSTM | yes | 95.00 (short by 1.00) |" in table, "of a baseline, on the same episodes"
    assert "| baseline-finetune | yes | 96.00 |" in table


def test_further_seeds_begin_with_a_run_of_the_same_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape, training = EpisodeShape(5, 1, 2), FewShotTrainConfig(1, validation_episodes=2)
    parts = ("glyphs", FinetuneConfig(steps=1), Conv4(width=2), shape, shape, training)
    first = FewShotRecipe("first", "before", *parts)
    second = FewShotRecipe("second", "after", *parts, start="first")
    monkeypatch.setattr("benchmarks.fewshot.load_recipes", lambda: {"first": first, "second": second})
    arguments = Namespace(runs=tmp_path, root=None, steps=None, time_limit=float("inf"), seeds=[1])
    for name in ("first", "second"):
        train(Namespace(**vars(arguments), recipe=[name]))
    started = Path(json.loads((tmp_path / "second-seed1" / "config.json").read_text())["start"])
    assert started == tmp_path / "seed1" / "first" and learner_info(started).training["settings"]["seed"] == 1
    found = {
        (name, seed, run.trainer.finished) for name, seed, run in runs(Namespace(runs=tmp_path, recipe=[], root=None))
    }
    assert found == {("first", 1, True), ("second", 1, True)}


def test_runs_are_found_with_the_seed_and_the_steps_that_they_were_begun_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipes()["sinusoid-maml"]
    training = replace(recipe.training, seed=3, steps=2, validation_episodes=2)
    for _ in Run(replace(recipe, training=training), tmp_path / "sinusoid-maml-seed3").run():
        pass
    monkeypatch.setattr(
        "benchmarks.fewshot.load_recipes",
        lambda: {recipe.name: replace(recipe, training=replace(training, seed=0, steps=9))},
    )
    ((name, seed, run),) = runs(Namespace(runs=tmp_path, recipe=[], root=None))
    assert (name, seed, run.trainer.recipe.training.steps, run.trainer.finished) == ("sinusoid-maml", 3, 2, True)


def test_what_is_left_to_validation_is_chosen_for_every_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And on validation classes: their rate is another where there are more ways, or more shots."""
    chosen_on: list[tuple[str, int, int, int]] = []

    def choose(self: Finetune, episodes: EpisodeList) -> dict[str, float]:
        task = episodes.task
        chosen_on.append((task.classes.name, task.ways, task.shots, len(episodes)))
        return {}

    monkeypatch.setattr(Finetune, "choose_settings", choose)
    shape = EpisodeShape(5, 1, 2)
    learner, training = FinetuneConfig(steps=1), FewShotTrainConfig(1, validation_episodes=2)
    recipe = FewShotRecipe("tiny", "", "glyphs", learner, Conv4(width=2), shape, shape, training)
    run = Run(recipe, tmp_path)
    assert len(list(run.run())) == 1
    table = Table("", "", ((5, 1), (10, 2)), (Row("fine-tuning", {(5, 1): "tiny", (10, 2): "tiny"}),))
    monkeypatch.setattr("benchmarks.fewshot.TABLES", {"": table})
    chosen_on.clear()
    arguments = Namespace(root=None, ways=[5, 10], shots=[1, 2], episodes=2)
    found = [(label, setting, result.n) for label, setting, result in image_results(run, arguments)]
    assert found == [("fine-tuning", "5-way 1-shot", 2), ("fine-tuning", "10-way 2-shot", 2)]
    assert chosen_on[-2:] == [("glyphs/validation", 5, 1, 100), ("glyphs/validation", 10, 2, 50)]


@pytest.mark.parametrize("config", [ProtoNetConfig(), MatchingConfig(full_context=True)])
def test_features_taken_once_give_the_same_accuracies(config: ProtoNetConfig | MatchingConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 16, 16), generator=generator, dtype=torch.uint8)
    classes = ClassSet("noise/test", tuple(map(str, range(6))), images, (10,) * 6)
    learner = config.build(Conv4(width=4), LearnerShape((1, 16, 16), 3), generator)
    bare, features = on_features(learner, classes)
    assert features.images.ndim == 2
    results = [
        evaluate(one, FewShotTask(some, 3, 1, 5).frozen(20)) for one, some in ((learner, classes), (bare, features))
    ]
    assert results[0].values == results[1].values
    assert learner.fit(torch.rand(3, 1, 16, 16), torch.arange(3)), "the learner itself is as it was"
    for other in (MAMLConfig().build(Conv4(width=4), learner.shape), learner.with_config(normalization="support")):
        assert on_features(other, classes) == (other, classes)


def test_another_method_takes_over_the_network_of_a_run(tmp_path: Path) -> None:
    """All of it where it has the same weights, else the backbone alone."""
    shape = EpisodeShape(5, 1, 2)
    training = FewShotTrainConfig(1, validation_episodes=2)
    for config in (FinetuneConfig(steps=1), ANILConfig()):
        recipe = FewShotRecipe(config.kind, "", "glyphs", config, Conv4(width=2), shape, shape, training)
        run = Run(recipe, tmp_path / config.kind)
        assert len(list(run.run())) == 1
        row = Row("", {}, learner=NearestNeighbourConfig(normalization="support"))
        theirs, ours = run.trainer.best_weights, as_row(row, run, run.trainer.best_learner()).state_dict()
        taken = {name for name, value in ours.items() if name in theirs and torch.equal(value, theirs[name])}
        assert taken >= {name for name in theirs if name.startswith("model.backbone.")}
        assert ("model.head.weight" in taken) == (config.kind == "finetune")
