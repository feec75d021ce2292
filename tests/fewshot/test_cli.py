"""``learnedopt fewshot``, and the demonstration behind it."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt.cli import main
from learnedopt.fewshot import (
    LEARNERS,
    MLP,
    Episodes,
    EpisodeShape,
    FewShotRecipe,
    FewShotTrainer,
    LearnerShape,
    demo,
    load_learner,
    save_learner,
)
from learnedopt.fewshot.demo import FewShotDemo, compare, methods, plot, table
from learnedopt.fewshot.evaluate import Evaluation
from learnedopt.fewshot.learners import ProtoNetConfig
from tests.fewshot.test_training import blobs

Captured = pytest.CaptureFixture[str]
__all__ = ["blobs"]

RECIPE = """
from learnedopt.fewshot import MLP, EpisodeShape, FewShotRecipe, FewShotTrainConfig
from learnedopt.fewshot.learners import MAMLConfig

SHAPE = EpisodeShape(shots=3, queries=4)
TRAINING = FewShotTrainConfig(6, 2, validate_every=3, validation_episodes=4)
RECIPES = [
    FewShotRecipe("tiny", "For tests", "sinusoid", MAMLConfig(learning_rate=0.01), MLP(), SHAPE, SHAPE, TRAINING)
]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(RECIPE)
    return "mine.py:tiny"


def test_what_there_is_is_listed(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["fewshot", "list"]) == 0
    shown = capsys.readouterr().out
    expected = (*LEARNERS, "omniglot-vinyals", "glyphs", "sinusoid", "omniglot-maml-5way-1shot")
    assert all(name in shown for name in expected)
    monkeypatch.chdir(tmp_path)
    assert main(["fewshot", "list"]) == 0
    assert "recipes:" not in capsys.readouterr().out


def test_a_learner_is_trained_exported_and_judged(recipe: str, capsys: Captured) -> None:
    assert main(["fewshot", "train", recipe, "--export", "zoo", "--steps", "4", "--seed", "2"]) == 0
    shown = capsys.readouterr().out
    assert (
        "tiny: step 0 of 4, in runs/tiny-seed2" in shown and "best validation" in shown and "exported to zoo" in shown
    )
    settings = json.loads(Path("runs/tiny-seed2/config.json").read_text())
    assert settings["training"]["seed"] == 2 and settings["training"]["steps"] == 4
    assert load_learner("zoo/tiny").shape.ways is None
    assert main(["fewshot", "evaluate", "zoo/tiny", "--episodes", "8"]) == 0
    shown = capsys.readouterr().out
    assert "tiny on sinusoid, 3-shot: " in shown and "(mse, 8 episodes, not transductive)" in shown


def test_training_that_was_interrupted_goes_on(recipe: str, capsys: Captured) -> None:
    assert main(["fewshot", "train", recipe, "--time-limit", "0"]) == 0
    assert "all of it saved; the same command continues" in capsys.readouterr().out
    assert main(["fewshot", "train", recipe]) == 0
    assert "best validation" in capsys.readouterr().out
    assert len(Path("runs/tiny-seed0/log.jsonl").read_text().splitlines()) == 6


def test_a_signal_stops_between_two_steps(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = FewShotTrainer._step

    def interrupted(trainer: FewShotTrainer) -> float:
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return steps(trainer)

    monkeypatch.setattr(FewShotTrainer, "_step", interrupted)
    assert main(["fewshot", "train", recipe]) == 128 + signal.SIGTERM
    assert len(Path("runs/tiny-seed0/log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "no recipes in meta_training/fewshot"),
        (["train", "mine.py:other"], "no recipe 'other'; there are tiny"),
        (["train", "mine.py:tiny", "--device", "nowhere"], "cannot train on device 'nowhere'"),
        (["evaluate", "nothing"], "the zoo has no learner 'nothing'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, recipe: str, capsys: Captured) -> None:
    assert main(["fewshot", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_that_has_learned_nothing_says_so(recipe: str, capsys: Captured) -> None:
    text = Path("mine.py").read_text()
    Path("mine.py").write_text(text.replace("learning_rate=0.01", "learning_rate=1e30"))
    assert main(["fewshot", "train", recipe]) == 1
    shown = capsys.readouterr()
    assert "6 step(s) skipped, as their gradient or statistics were not finite" in shown.out
    assert "no validation had a finite error" in shown.err


def test_a_backbone_that_could_not_be_found_again_is_refused_before_training(recipe: str, capsys: Captured) -> None:
    text = Path("mine.py").read_text().replace("MLP()", "Mine()")
    Path("mine.py").write_text(text.replace("SHAPE =", "class Mine(MLP):\n    kind = 'mine'\n\n\nSHAPE =", 1))
    assert main(["fewshot", "train", recipe, "--export", "zoo"]) == 2
    assert "Mine is not in learnedopt.fewshot.BACKBONES. Put it there" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_folder_of_a_run_is_no_entry(recipe: str, capsys: Captured) -> None:
    assert main(["fewshot", "train", recipe]) == 0
    assert main(["fewshot", "evaluate", "runs/tiny-seed0"]) == 2
    assert "does not describe a zoo entry" in (error := capsys.readouterr().err) and "export that first" in error


@pytest.mark.parametrize("option", ["--ways", "--shots", "--queries", "--episodes"])
def test_counts_of_nothing_are_refused(option: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["fewshot", "evaluate", "omniglot-protonet-1shot", option, "0"])
    assert raised.value.code == 2 and f"argument {option}: must be at least" in capsys.readouterr().err


def test_an_entry_that_does_not_say_what_it_was_made_for_asks(blobs: str, tmp_path: Path, capsys: Captured) -> None:
    learner = ProtoNetConfig().build(MLP(hidden=(5,)), LearnerShape((4,), 3))
    settings: dict[str, Any] = {"description": "x", "backbone": MLP(hidden=(5,)), "card": "x", "training": {}}
    save_learner(learner, tmp_path / "bare", name="bare", **settings)
    folder = str(tmp_path / "bare")
    assert main(["fewshot", "evaluate", folder]) == 2
    assert "bare does not say what it was trained for: give --data, --ways and --shots" in capsys.readouterr().err
    given = ["--data", blobs, "--ways", "3", "--shots", "1", "--queries", "2", "--episodes", "3"]
    assert main(["fewshot", "evaluate", folder, *given]) == 0


def test_the_demonstration_compares_all_methods(blobs: str) -> None:
    small = FewShotDemo(data=blobs, test=EpisodeShape(3, 1, 2), episodes=4, backbone=MLP(hidden=(5,)), scale=0.005)
    results = [result for name, recipe in methods(small) for result in compare(small, name, _fewer_ways(recipe))]
    names = [result.name for result in results]
    assert names == ["fine-tuning", "nearest neighbour", "prototypical network", "MAML", "meta-LSTM"]
    assert all(0 <= result.evaluation.mean <= 1 and result.evaluation.n == 4 for result in results)
    shown = table(results)
    assert len(shown.splitlines()) == 6 and all(name in shown for name in names)


def _fewer_ways(recipe: FewShotRecipe) -> FewShotRecipe:
    """There are twelve classes of blobs."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, ways=min(recipe.train.ways, 10)))


def test_the_table_says_who_was_transductive() -> None:
    results = [
        demo.Result("a", Evaluation("accuracy", (0.5, 1.0), 0, transductive), 3, 1.0) for transductive in (True, False)
    ]
    assert [line.split()[-3] for line in table(results).splitlines()[1:]] == ["yes", "no"]


def test_an_episode_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    images = torch.rand(1, 6, 1, 8, 8), torch.rand(1, 15, 1, 8, 8)
    labels = torch.arange(3).repeat_interleave(2)[None], torch.arange(3).repeat_interleave(5)[None]
    plot(Episodes(images[0], labels[0], images[1], labels[1], ways=3), tmp_path / "episode.png")
    assert (tmp_path / "episode.png").read_bytes().startswith(b"\x89PNG")
