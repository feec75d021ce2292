"""Training runs: resumed bit for bit, killed at any moment, best weights kept; entries of the zoo."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt.fewshot import (
    LEARNERS,
    MLP,
    ClassSet,
    EpisodeShape,
    FewShotRecipe,
    FewShotTask,
    FewShotTrainConfig,
    FewShotTrainer,
    LearnerEntry,
    LearnerShape,
    TrainingError,
    datasets,
    episode_source,
    evaluate,
    learner_info,
    list_learners,
    load_fewshot_recipe,
    load_learner,
    load_recipes,
    save_learner,
)
from learnedopt.fewshot.learners import FinetuneConfig, MAMLConfig, MAMLPlusPlusConfig, ProtoNetConfig, ReptileConfig
from learnedopt.fewshot.sources import PARTS, Part
from learnedopt.runs import Run
from learnedopt.zoo import ZooError

FewShotRun = Run[FewShotTrainer, LearnerEntry]

SINE = FewShotRecipe(
    "tiny",
    "MAML for tests",
    "sinusoid",
    MAMLConfig(learning_rate=0.01),
    MLP(hidden=(6,)),
    EpisodeShape(shots=3, queries=4),
    EpisodeShape(shots=3, queries=4),
    FewShotTrainConfig(9, 2, schedule="cosine", validate_every=3, validation_episodes=5, checkpoint_every=2),
)


@pytest.fixture
def blobs(monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of points around class means, a name in ``DATASETS``."""

    def load(root: Path | None, part: Part) -> ClassSet:
        generator = torch.Generator().manual_seed(PARTS.index(part))
        points = torch.randn(12, 1, 4, generator=generator) + 0.5 * torch.randn(12, 8, 4, generator=generator)
        return ClassSet(f"blobs/{part}", tuple(map(str, range(12))), points.flatten(0, 1), (8,) * 12)

    monkeypatch.setattr(datasets, "DATASETS", {**datasets.DATASETS, "blobs": load})
    return "blobs"


def classification(learner: Any, data: str = "blobs", batch_norm: bool = False, **training: Any) -> FewShotRecipe:
    shape = EpisodeShape(ways=3, shots=1, queries=3)
    settings = {"steps": 6, "validate_every": 3, "validation_episodes": 4} | training
    return FewShotRecipe(
        "tiny", "for tests", data, learner, MLP((6,), batch_norm), shape, shape, FewShotTrainConfig(**settings)
    )


def finish(run: FewShotRun) -> list[dict[str, Any]]:
    return list(run.run())


def same(run: FewShotRun, other: FewShotRun) -> None:
    """Everything that the rest of a run depends on, and what it has found."""
    one, two = run.trainer, other.trainer
    states = one.learner.state_dict(), two.learner.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert all(torch.equal(value, two.best_weights[name]) for name, value in one.best_weights.items())
    assert torch.equal(one.generator.get_state(), two.generator.get_state())
    assert (one.step, one.best_step, one.best_score) == (two.step, two.best_step, two.best_score)


@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_a_run_stopped_and_resumed_ends_bit_for_bit_alike(stop_after: int, tmp_path: Path) -> None:
    whole = Run(SINE, tmp_path / "whole")
    records = finish(whole)
    assert [record["step"] for record in records] == list(range(1, 10)) and whole.trainer.finished
    first = Run(SINE, tmp_path / "parts")
    running = first.run()
    for _ in range(stop_after):
        next(running)
    running.close()
    second = Run(SINE, tmp_path / "parts")
    assert second.trainer.step == stop_after
    finish(second)
    same(whole, second)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    without_time = [[json.loads(line) | {"seconds": 0} for line in log] for log in logs]
    assert without_time[0] == without_time[1] and len(logs[0]) == 9


@pytest.mark.parametrize("kind", sorted(LEARNERS))
def test_every_method_trains_validates_and_resumes(kind: str, blobs: str, tmp_path: Path) -> None:
    short = {"finetune": {"learning_rates": (0.1,), "decays": (0.0,)}, "reptile": {"test_steps": 2}}
    config = LEARNERS[kind](**short.get(kind, {}))  # type: ignore[arg-type]
    recipe = classification(config, optimizer="sgd" if kind == "reptile" else "adam")
    whole = Run(recipe, tmp_path / "whole")
    before = {name: weight.clone() for name, weight in whole.trainer.learner.named_parameters()}
    finish(whole)
    assert any(not torch.equal(weight, before[name]) for name, weight in whole.trainer.learner.named_parameters())
    assert 0 <= whole.trainer.best_score <= 1 and whole.trainer.best_step in (3, 6)
    run = Run(recipe, tmp_path / "parts").run()
    for _ in range(2):
        next(run)
    run.close()
    resumed = Run(recipe, tmp_path / "parts")
    finish(resumed)
    same(whole, resumed)


def test_training_learns(blobs: str, tmp_path: Path) -> None:
    """Points around random means: the loss of fresh episodes falls."""
    run = Run(classification(ProtoNetConfig(), steps=150, validate_every=150, episodes_per_step=4), tmp_path)
    losses = [record["loss"] for record in run.run()]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_the_best_weights_are_kept_and_not_the_last(blobs: str, tmp_path: Path) -> None:
    recipe = classification(ProtoNetConfig(), steps=40, validate_every=5, learning_rate=0.5)
    run = Run(recipe, tmp_path)
    scores = {record["step"]: record["validation"] for record in run.run() if "validation" in record}
    assert run.trainer.best_score == max(scores.values()) and scores[run.trainer.best_step] == run.trainer.best_score
    validation = episode_source(blobs, recipe.test, "validation").frozen(4)
    assert evaluate(run.trainer.best_learner(), validation).mean == run.trainer.best_score


def test_a_killed_run_goes_on_where_its_last_checkpoint_was(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SINE, training=dataclasses.replace(SINE.training, steps=100_000))
    program = f"""
from tests.fewshot.test_training import SINE
import dataclasses, torch
from learnedopt.runs import Run
torch.set_num_threads(1)
recipe = dataclasses.replace(SINE, training=dataclasses.replace(SINE.training, steps=100_000))
for _ in Run(recipe, {str(tmp_path / "killed")!r}).run():
    pass
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = Run(recipe, tmp_path / "killed")
    assert resumed.trainer.step % 2 == 0 and resumed.trainer.step > 0
    other = Run(recipe, tmp_path / "other")
    running = other.run()
    while other.trainer.step < resumed.trainer.step:
        next(running)
    running.close()
    same(resumed, other)
    next(resumed.run())
    lines = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, resumed.trainer.step + 1))


def test_a_run_stops_when_asked_and_when_its_time_is_over(tmp_path: Path) -> None:
    run = Run(SINE, tmp_path)
    assert len(list(run.run(time_limit=0.0))) <= 1
    assert list(run.run(stop=lambda: True)) == []
    assert Run(SINE, tmp_path).trainer.step == run.trainer.step


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    next(run := Run(SINE, tmp_path).run())
    run.close()
    other = dataclasses.replace(SINE, learner=MAMLConfig(learning_rate=0.02))
    with pytest.raises(ValueError, match=r"other settings \(learner.learning_rate was 0.01, is 0.02\)"):
        Run(other, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"damage")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        Run(SINE, tmp_path)


@pytest.mark.parametrize(("name", "content"), [("config.json", '{"name": "mine"}'), ("log.jsonl", "mine")])
def test_files_that_are_not_a_runs_stay_as_they_are(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"has a {name} that is not of a run of tiny: choose another folder"):
        Run(SINE, tmp_path)
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_a_run_killed_while_it_describes_itself_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *paths: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            Run(SINE, tmp_path)
    finish(Run(SINE, tmp_path))


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    Run(SINE, tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    finish(Run(SINE, tmp_path))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == SINE.training.steps


def test_there_is_no_best_learner_before_the_first_validation(tmp_path: Path) -> None:
    run = Run(SINE, tmp_path)
    one_step(run)
    with pytest.raises(ValueError, match=r"no best learner yet: no validation in the 1 step\(s\) so far"):
        run.trainer.best_learner()


def test_validation_is_under_the_settings_that_are_best_there(blobs: str, tmp_path: Path) -> None:
    """Else the weights that are kept would be those that bear an unsuited rate best."""
    config = FinetuneConfig(learning_rate=1e30, learning_rates=(1e30, 0.1), decays=(0.0,))
    run = Run(classification(config, validation_episodes=20), tmp_path)
    scores = [record["validation"] for record in finish(run) if "validation" in record]
    assert min(scores) > 0.5 and run.trainer.learner.config == config
    best = run.trainer.best_learner()
    episodes = episode_source(blobs, run.trainer.recipe.test, "validation").frozen(20)
    assert evaluate(best, episodes).mean == run.trainer.best_score


@dataclasses.dataclass(frozen=True)
class Dropping(MLP):
    """A network that draws for itself."""

    def build(self, example_shape: tuple[int, ...]) -> torch.nn.Module:
        return torch.nn.Sequential(super().build(example_shape), torch.nn.Dropout(0.5))


def test_what_a_backbone_draws_outlives_an_interruption_and_leaves_other_draws_alone(
    blobs: str, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(classification(ProtoNetConfig()), backbone=Dropping((6,)))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    finish(whole := Run(recipe, tmp_path / "whole"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    one_step(Run(recipe, tmp_path / "parts"))
    finish(parts := Run(recipe, tmp_path / "parts"))
    same(whole, parts)


def test_gradients_that_are_not_finite_are_skipped_and_too_many_stop_the_run(tmp_path: Path) -> None:
    broken = dataclasses.replace(
        SINE,
        learner=MAMLConfig(learning_rate=1e30),
        training=dataclasses.replace(SINE.training, max_skipped=2),
    )
    run = Run(broken, tmp_path)
    before = {name: weight.clone() for name, weight in run.trainer.learner.named_parameters()}
    with pytest.raises(TrainingError, match="3 steps had a gradient or statistics that are not finite"):
        finish(run)
    assert all(torch.equal(weight, before[name]) for name, weight in run.trainer.learner.named_parameters())


def one_step(run: FewShotRun) -> None:
    steps = run.run()
    next(steps)
    steps.close()


@pytest.mark.parametrize("clip", [{}, {"clip_value": 1.0}, {"clip_norm": 1.0}])
def test_infinite_gradients_are_skipped_and_not_clipped(
    clip: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(dataclasses.replace(SINE, training=dataclasses.replace(SINE.training, **clip)), tmp_path)
    before = {name: weight.clone() for name, weight in run.trainer.learner.named_parameters()}
    monkeypatch.setattr(
        run.trainer.learner,
        "training_step",
        lambda *_: math.inf * torch.stack([w.sum() for w in run.trainer.learner.parameters()]).sum(),
    )
    one_step(run)
    assert run.trainer.skipped == 1
    assert all(torch.equal(weight, before[name]) for name, weight in run.trainer.learner.named_parameters())


@pytest.mark.parametrize("learner", [ProtoNetConfig(), MAMLConfig(normalization="running"), ReptileConfig()])
def test_a_skipped_step_leaves_averages_as_they_were(
    learner: Any, blobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(classification(learner, blobs, batch_norm=True), tmp_path)
    one_step(run)
    before = {name: value.clone() for name, value in run.trainer.learner.state_dict().items() if name != "progress"}
    drawn = type(run.trainer.source).episodes

    def bad(source: Any, generator: torch.Generator) -> Any:
        found = drawn(source, generator)
        found.support_x[0, 0, 0] = math.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(run.trainer.source), "episodes", bad)
        one_step(run)
    assert run.trainer.skipped == 1
    after = run.trainer.learner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    one_step(run)
    assert run.trainer.skipped == 1 and all(
        value.isfinite().all() for value in run.trainer.learner.state_dict().values()
    )


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        ({"schedule": "constant"}, 7, 0.1),
        ({"schedule": "linear"}, 5, 0.05),
        ({"schedule": "cosine"}, 5, 0.05),
        ({"schedule": "cosine"}, 0, 0.1),
        ({"halve_every": 3}, 2, 0.1),
        ({"halve_every": 3}, 7, 0.025),
    ],
)
def test_the_learning_rate_falls_as_said(config: dict[str, Any], step: int, expected: float) -> None:
    assert FewShotTrainConfig(10, learning_rate=0.1, **config).learning_rate_at(step) == pytest.approx(expected)


@pytest.mark.parametrize("clip", [{"clip_value": 1e-4}, {"clip_norm": 1e-4}])
def test_gradients_are_clipped(clip: dict[str, Any], tmp_path: Path) -> None:
    """With plain gradient descent at rate one, the clipped gradient is the step."""
    training = dataclasses.replace(
        SINE.training, steps=1, optimizer="sgd", learning_rate=1.0, schedule="constant", **clip
    )
    run = Run(dataclasses.replace(SINE, training=training), tmp_path)
    before = torch.cat([weight.detach().flatten().clone() for weight in run.trainer.learner.parameters()])
    finish(run)
    moved = torch.cat([weight.detach().flatten() for weight in run.trainer.learner.parameters()]) - before
    size = moved.abs().max() if "clip_value" in clip else moved.norm()
    assert 0.9e-4 < float(size) < 1.1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"optimizer": "lion"},
        {"schedule": "step"},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_value": -1.0},
        {"halve_every": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FewShotTrainConfig(**({"steps": 1} | change))


@pytest.mark.parametrize("config", [ProtoNetConfig(), MAMLConfig(), FinetuneConfig(learning_rates=(0.1, 0.2))])
def test_an_exported_learner_is_loaded_as_it_was(config: Any, blobs: str, tmp_path: Path) -> None:
    recipe = classification(config)
    run = Run(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match=r"no validation in the 0 step\(s\) so far"):
        run.export(tmp_path / "zoo")
    finish(run)
    entry = run.export(tmp_path / "zoo")
    assert entry.name == "tiny" and entry.card.startswith("# tiny") and entry.training["steps"] == 6
    best = run.trainer.best_learner()
    learner = load_learner(entry.path, best.config.normalization)
    assert learner.config == best.config and not learner.training
    episodes = episode_source(blobs, recipe.test, "test").frozen(5)
    assert evaluate(learner, episodes).values == evaluate(best, episodes).values
    (entry.path / "card.md").write_text("mine")
    assert run.export(tmp_path / "zoo").card == "mine"


@pytest.mark.parametrize("kind", sorted(LEARNERS))
def test_training_begins_with_a_backbone_that_was_trained_before(kind: str, blobs: str, tmp_path: Path) -> None:
    first = Run(classification(FinetuneConfig(learning_rates=(0.1,), decays=(0.0,)), batch_norm=True), tmp_path)
    finish(first)
    trained = first.export(tmp_path / "zoo").path
    optimizer = "sgd" if kind == "reptile" else "adam"
    fresh = classification(LEARNERS[kind](), batch_norm=True, optimizer=optimizer)
    recipe = dataclasses.replace(fresh, start=str(trained))
    runs = Run(recipe, tmp_path / "run"), Run(fresh, tmp_path / "fresh")
    for key, value in runs[0].trainer.learner.state_dict().items():
        if key.startswith("model.backbone."):
            expected = load_learner(trained).state_dict()[key]
            assert torch.equal(value, expected.expand_as(value)), key
            assert torch.equal(value, runs[0].trainer.best_weights[key])
        elif key.startswith("model.head."):  # made for other classes
            assert not value.any()
        else:  # what else the method learns, as without
            assert torch.equal(value, runs[1].trainer.learner.state_dict()[key]), key
    finish(runs[0])
    same(runs[0], Run(recipe, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"other settings \(start was '.*tiny', is None\)"):
        Run(fresh, tmp_path / "run")


def test_a_start_that_does_not_fit_is_refused(blobs: str, tmp_path: Path) -> None:
    first = Run(classification(ProtoNetConfig()), tmp_path / "first")
    finish(first)
    trained = str(first.export(tmp_path / "zoo").path)
    other = classification(MAMLConfig(), batch_norm=True)
    with pytest.raises(
        ValueError, match=r"tiny cannot begin with .*tiny: that has the backbone MLP\(.* and this MLP\("
    ):
        Run(dataclasses.replace(other, start=trained), tmp_path / "other")
    with pytest.raises(ZooError, match="no learner 'nothing'"):
        Run(dataclasses.replace(other, start="nothing"), tmp_path / "other")
    rows = Run(classification(MAMLPlusPlusConfig(), batch_norm=True), tmp_path / "rows")
    finish(rows)
    trained = str(rows.export(tmp_path / "zoo").path)
    with pytest.raises(ValueError, match=r"that has model\.backbone\..* one row for each of its inner steps"):
        Run(dataclasses.replace(other, start=trained), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_entry_is_refused(tmp_path: Path) -> None:
    learner = MAMLConfig().build(MLP(hidden=(3,)), Run(SINE, tmp_path / "run").trainer.learner.shape)
    settings: dict[str, Any] = {
        "name": "x",
        "description": "x",
        "card": "x",
        "training": {},
        "backbone": MLP(hidden=(3,)),
    }
    entry = save_learner(learner, tmp_path / "x", **settings)
    assert load_learner(tmp_path / "x", "transductive").config == MAMLConfig() == learner_info(entry.path).learner
    weights = tmp_path / "x" / "weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ZooError, match="truncated or corrupted"):
        load_learner(tmp_path / "x")
    weights.write_bytes(good)
    config = tmp_path / "x" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"learning_rate": 0.4', '"learning_rate": 0.5'))
    with pytest.raises(ZooError, match="does not match the weights beside it"):
        load_learner(tmp_path / "x")
    config.write_text(text.replace('"kind": "maml"', '"kind": "unheard-of"'))
    with pytest.raises(ZooError, match="describes no learner that can be built"):
        load_learner(tmp_path / "x")
    with pytest.raises(ZooError, match="no learner 'nothing'"):
        load_learner("nothing")
    with pytest.raises(ZooError, match=r"no learner 'omniglot-finetuned'.* Did you mean 'omniglot-finetune'\?"):
        load_learner("omniglot-finetuned")
    with pytest.raises(ZooError, match=r"there is no folder '\./nothing'"):
        load_learner("./nothing")
    (tmp_path / "x" / "card.md").unlink()
    with pytest.raises(ZooError, match=r"cannot read .*card\.md"):
        _ = entry.card
    with torch.no_grad():
        next(learner.parameters()).fill_(math.nan)
    with pytest.raises(ZooError, match="not finite"):
        save_learner(learner, tmp_path / "y", **settings)
    assert not (tmp_path / "y").exists()


def test_every_shipped_learner_loads() -> None:
    for name in list_learners():
        entry, learner = learner_info(name), load_learner(name)
        assert entry.name == name and entry.card.startswith(f"# {name}")
        example = torch.zeros(entry.shape.ways or 3, *entry.shape.example_shape)
        labels = torch.arange(len(example)) if entry.shape.ways else torch.zeros(len(example), 1)
        assert learner.fit(example, labels).predict(example).isfinite().all()


# Accuracy on letters of fonts, which none has seen: 20 episodes of 5 ways, 1 shot. Chance is 0.2.
ON_LETTERS = {
    "mini-imagenet-finetune": 0.42,
    "mini-imagenet-meta-lstm-head-1shot": 0.46,
    "mini-imagenet-meta-lstm-head-5shot": 0.48,
    "mini-imagenet-meta-lstm-pretrained-1shot": 0.51,
    "mini-imagenet-meta-lstm-pretrained-5shot": 0.53,
    "omniglot-finetune": 0.57,
    "omniglot-maml-5way-1shot": 0.75,
    "omniglot-maml-pretrained-5way-1shot": 0.78,
    "omniglot-meta-lstm-head-1shot": 0.64,
    "omniglot-meta-lstm-head-5shot": 0.61,
    "omniglot-meta-lstm-pretrained-5way-1shot": 0.71,
    "omniglot-meta-lstm-pretrained-5way-5shot": 0.72,
    "omniglot-protonet-1shot": 0.89,
    "omniglot-protonet-strided": 0.8,
}


def test_shipped_learners_learn_letters_as_well_as_they_did() -> None:
    assert sorted(ON_LETTERS) == list_learners()
    for name, recorded in ON_LETTERS.items():
        learner = load_learner(name, learner_info(name).learner.normalization)
        channels, size, _ = learner.shape.example_shape
        classes = datasets.glyphs("test", letters=20, examples=6, size=size)
        classes = dataclasses.replace(classes, images=classes.images.expand(-1, channels, -1, -1))
        episodes = FewShotTask(classes, ways=5, shots=1, queries=5).frozen(20)
        assert evaluate(learner, episodes).mean > recorded - 0.02, name


def test_the_recipes_have_names_of_their_own_and_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    recipes = load_recipes()
    assert {recipe.data for recipe in recipes.values()} >= {"omniglot-vinyals", "sinusoid"}
    assert load_fewshot_recipe("sinusoid-maml").training.episodes_per_step == 25
    with pytest.raises(ValueError, match=r"no recipe 'omniglot'; there are .*omniglot-protonet-1shot, "):
        load_fewshot_recipe("omniglot")
    copy = tmp_path / "mine.py"
    shutil.copy("meta_training/fewshot/sinusoid.py", copy)
    assert load_fewshot_recipe(f"{copy}:sinusoid-maml") == recipes["sinusoid-maml"]
    copy.write_text("RECIPES = 3")
    with pytest.raises(ValueError, match="must define RECIPES, a list of FewShotRecipe"):
        load_recipes(copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no recipes in meta_training/fewshot"):
        load_recipes()


def test_reptile_moves_by_its_pseudo_gradient(blobs: str, tmp_path: Path) -> None:
    """Its loss carries no graph, and yet the loop moves the weights."""
    recipe = classification(ReptileConfig(), steps=1, optimizer="sgd", learning_rate=1.0)
    run = Run(recipe, tmp_path)
    before = run.trainer.learner.state_dict()["model.head.weight"].clone()
    finish(run)
    assert not torch.equal(run.trainer.learner.state_dict()["model.head.weight"], before)


def test_a_file_of_recipes_needs_a_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from learnedopt.fewshot import *\nRECIPES = []\n")
    with pytest.raises(ValueError, match=r"say which recipe of .*mine\.py is meant, as .*mine\.py:NAME"):
        load_fewshot_recipe(str(file))


def test_every_recipe_can_be_built() -> None:
    shapes = {"omniglot-vinyals": (1, 28, 28), "mini-imagenet-ravi": (3, 84, 84), "sinusoid": (1,)}
    for recipe in load_recipes(Path(__file__).parents[2] / "meta_training" / "fewshot").values():
        ways = None if recipe.data == "sinusoid" else recipe.test.ways
        shape = LearnerShape(shapes[recipe.data], ways, num_classes=64)
        with torch.device("meta"):
            learner = recipe.learner.build(recipe.backbone, shape)
        assert learner.config == recipe.learner and recipe.description.count("\n") == 0
        assert learner.any_ways or recipe.train.ways == recipe.test.ways, recipe.name
        if recipe.data != "sinusoid":
            assert recipe.train.shots == (10 if recipe.learner.kind == "reptile" else recipe.test.shots)
            assert recipe.train.shots + recipe.train.queries <= 20 or recipe.data != "omniglot-vinyals"
