"""Few-shot learning: accuracy on Omniglot and mini-ImageNet, error on sine waves, beside published figures.

    python benchmarks/fewshot.py train omniglot-maml-5way-1shot --root DIR --time-limit 3600
    python benchmarks/fewshot.py evaluate --root DIR
    python benchmarks/fewshot.py table

``train`` goes on with a recipe of ``meta_training/fewshot``, in ``runs/fewshot``; one run for each of ``--seeds``. Most
recipes are short; ``--steps`` makes a longer run of one, in another folder (``--runs``) if there is one already. A
recipe that begins with a learner takes that of the zoo with seed 0; with another seed, the run of that seed if there
is one.
``evaluate`` judges all runs that there are, by their best weights so far, on the frozen test episodes, and adds to
``benchmarks/results/fewshot.json`` (one entry per run and setting; others stay). ``table`` writes
``fewshot_omniglot.md``, ``fewshot_mini_imagenet.md`` and ``fewshot_sinusoid.md`` from it. Intervals are 95 % over
episodes; where there are several training seeds, their standard deviation stands behind.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from learnedopt.fewshot import (
    ClassSet,
    EpisodeShape,
    Evaluation,
    FewShotRecipe,
    FewShotTask,
    FewShotTrainer,
    Learner,
    LearnerConfig,
    LearnerEntry,
    check_frozen,
    episode_source,
    evaluate,
    load_classes,
    load_recipes,
)
from learnedopt.fewshot.learners import FinetuneConfig, NearestNeighbourConfig
from learnedopt.fewshot.learners.embedding import EmbeddingLearner
from learnedopt.runs import Run

FewShotRun = Run[FewShotTrainer, LearnerEntry]

RESULTS = Path(__file__).parent / "results"
_COMMON = 600
"""Episodes that every method has been judged on; some, where a figure is near what it is aimed at, on more."""
Setting = tuple[int, int]
"""Ways and shots."""
OMNIGLOT_SETTINGS: tuple[Setting, ...] = ((5, 1), (5, 5), (20, 1), (20, 5))
MINI_IMAGENET_SETTINGS: tuple[Setting, ...] = ((5, 1), (5, 5))


@dataclass(frozen=True)
class Row:
    """One line of the table: how a method was trained for each setting, and what others report."""

    label: str
    recipes: dict[Setting, str]
    published: tuple[str, ...] = ()
    """In the order of the table's settings, if there are any."""
    reproduced: tuple[str, ...] = ()
    """By independent code; see ``docs/fewshot.md`` for the sources."""
    targets: tuple[float | None, ...] = ()
    """What the accuracy should reach."""
    above: tuple[str, ...] = ()
    """Labels of rows that it should be above."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of the learner that are others in evaluation than in training."""
    learner: LearnerConfig | None = None
    """Another method that runs on the same trained weights."""


@dataclass(frozen=True)
class Table:
    """The rows of one data set of images."""

    title: str
    about: str
    """What of the episodes and figures is particular to it."""
    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]


def _all(name: str, settings: tuple[Setting, ...] = OMNIGLOT_SETTINGS) -> dict[Setting, str]:
    return dict.fromkeys(settings, name)


def _each(name: str) -> dict[Setting, str]:
    return {(ways, shots): f"{name}-{ways}way-{shots}shot" for ways, shots in OMNIGLOT_SETTINGS}


def _by_shots(name: str, settings: tuple[Setting, ...] = MINI_IMAGENET_SETTINGS) -> dict[Setting, str]:
    return {(ways, shots): f"{name}-{shots}shot" for ways, shots in settings}


_MAML_TARGETS = (98.1, 99.5, 91.6, 97.5)
_MAML = ("98.7 ± 0.4", "99.9 ± 0.1", "95.8 ± 0.3", "98.9 ± 0.2")
_MAML_AGAIN = ("99.1, 98.1", "", "91.6", "95.9")
_REPTILE = {(ways, shots): f"omniglot-reptile-{ways}way" for ways, shots in OMNIGLOT_SETTINGS}
# On validation, for each setting, as the rate of fine-tuning.
_CALIBRATED = {"gate_shifts": (0.0, -0.5, -1.0)}
_BASELINES = ("baseline-finetune", "baseline-nearest-neighbour")
_LONGER = tuple(f"{label}, pretrained longer" for label in _BASELINES)
# A method is to be above the baselines as they are usually run, as they are under the statistics that it uses, and as
# they are at their best. In the order of the columns of ``comparison``; a table without such a row has no such column.
_COLUMNS = (
    *_BASELINES,
    *(f"{label}, same statistics" for label in _BASELINES),
    f"{_LONGER[0]}, same statistics",
    _LONGER[1],
)
_ABOVE = tuple(label.replace("same statistics", "by the support set") for label in _COLUMNS)
_ABOVE_TRANSDUCTIVE = tuple(label.replace("same statistics", "transductive") for label in _COLUMNS)


def _baselines(
    recipe: dict[Setting, str],
    tuned: tuple[str, ...],
    tuned_again: tuple[str, ...] = (),
    nearest: tuple[str, ...] = (),
) -> tuple[Row, ...]:
    """Both, with running averages; and with the batch statistics of the support set or of all queries.

    The others are what is published and reproduced of fine-tuning, and published of nearest neighbours.
    """
    finetune, neighbour = _BASELINES
    return (
        Row(finetune, recipe, tuned, tuned_again),
        Row(f"{finetune}, by the support set", recipe, changes={"normalization": "support"}),
        Row(f"{finetune}, transductive", recipe, changes={"normalization": "transductive"}),
        Row(neighbour, recipe, nearest, learner=NearestNeighbourConfig()),
        Row(f"{neighbour}, by the support set", recipe, learner=NearestNeighbourConfig(normalization="support")),
        Row(f"{neighbour}, transductive", recipe, learner=NearestNeighbourConfig(normalization="transductive")),
    )


OMNIGLOT = (
    *_baselines(_all("omniglot-finetune"), ("86.0", "97.6", "72.9", "92.3"), ("95", "", "90", "")),
    Row(f"{_LONGER[0]}, by the support set", _all("omniglot-finetune-long"), changes={"normalization": "support"}),
    Row(f"{_LONGER[0]}, transductive", _all("omniglot-finetune-long"), changes={"normalization": "transductive"}),
    Row(_LONGER[1], _all("omniglot-finetune-long"), learner=NearestNeighbourConfig()),
    Row(
        "matching networks",
        _by_shots("omniglot-matching", OMNIGLOT_SETTINGS),
        ("98.1", "98.9", "93.8", "98.5"),
        ("92.0 (cosine), 98.3 (L2)", "93.2, 99.8", "75.6, 92.8", "77.8, 97.8"),
        (97.1, 97.9, 92.8, 97.5),
    ),
    Row("meta-LSTM", _each("omniglot-meta-lstm"), above=_ABOVE, changes={"normalization": "support"}),
    Row("meta-LSTM, transductive", _each("omniglot-meta-lstm"), above=_ABOVE_TRANSDUCTIVE),
    Row(
        "meta-LSTM, pretrained",
        _each("omniglot-meta-lstm-pretrained"),
        above=_ABOVE,
        changes={"normalization": "support"} | _CALIBRATED,
    ),
    Row(
        "meta-LSTM, pretrained, transductive",
        _each("omniglot-meta-lstm-pretrained"),
        above=_ABOVE_TRANSDUCTIVE,
        changes=_CALIBRATED,
    ),
    Row(
        "meta-LSTM of the read-out, pretrained",
        _by_shots("omniglot-meta-lstm-head", OMNIGLOT_SETTINGS),
        above=_ABOVE,
        changes={"normalization": "support"},
    ),
    Row(
        "meta-LSTM of the read-out, pretrained, transductive",
        _by_shots("omniglot-meta-lstm-head", OMNIGLOT_SETTINGS),
        above=_ABOVE_TRANSDUCTIVE,
    ),
    *(
        Row(
            f"{label}, {how}, with the meta-LSTM's features",
            _by_shots("omniglot-meta-lstm-head", OMNIGLOT_SETTINGS),
            learner=learner,
        )
        for label, how, learner in (
            (_BASELINES[0], "transductive", FinetuneConfig(normalization="transductive")),
            (_BASELINES[1], "by the support set", NearestNeighbourConfig(normalization="support")),
            (_BASELINES[1], "transductive", NearestNeighbourConfig(normalization="transductive")),
        )
    ),
    Row(
        "prototypical networks",
        _by_shots("omniglot-protonet", OMNIGLOT_SETTINGS),
        ("98.8", "99.7", "96.0", "98.9"),
        ("98.4", "99.6", "94.9", "98.6"),
        (98.4, 99.6, 94.9, 98.6),
    ),
    Row(
        "prototypical networks, trained 1-shot",
        dict.fromkeys(((5, 5), (20, 5)), "omniglot-protonet-1shot"),
        targets=(None, 99.6, None, 98.6),
    ),
    Row(
        "prototypical networks, with strides, trained 1-shot",
        _all("omniglot-protonet-strided"),
        targets=(98.4, 99.6, 94.9, 98.6),
    ),
    Row("MAML, transductive", _each("omniglot-maml"), _MAML, _MAML_AGAIN, _MAML_TARGETS),
    Row("MAML", _each("omniglot-maml"), changes={"normalization": "support"}),
    Row("MAML, pretrained, transductive", _each("omniglot-maml-pretrained"), targets=_MAML_TARGETS),
    Row("MAML, pretrained", _each("omniglot-maml-pretrained"), changes={"normalization": "support"}),
    Row(
        "first-order MAML, transductive",
        _each("omniglot-fomaml"),
        ("98.3 ± 0.5", "99.2 ± 0.2", "89.4 ± 0.5", "97.9 ± 0.1"),
        ("97.13, 95.5", "", "92.2", "97.7"),
    ),
    Row("first-order MAML", _each("omniglot-fomaml"), changes={"normalization": "support"}),
    Row(
        "Meta-SGD, transductive",
        _each("omniglot-meta-sgd"),
        ("99.53 ± 0.26", "99.93 ± 0.09", "", ""),
        targets=(98.53, 98.93, None, None),
    ),
    Row("Meta-SGD", _each("omniglot-meta-sgd"), changes={"normalization": "support"}),
    Row(
        "Meta-SGD, pretrained, transductive", _each("omniglot-meta-sgd-pretrained"), targets=(98.53, 98.93, None, None)
    ),
    Row("Meta-SGD, pretrained", _each("omniglot-meta-sgd-pretrained"), changes={"normalization": "support"}),
    Row("ANIL, transductive", _each("omniglot-anil")),
    Row("ANIL", _each("omniglot-anil"), changes={"normalization": "support"}),
    Row(
        "MAML++, transductive",
        _each("omniglot-maml-pp"),
        ("99.47", "99.93", "97.65", "99.33"),
        ("", "", "96.65", ""),
        (98.47, 98.93, 96.65, 98.33),
    ),
    Row("MAML++", _each("omniglot-maml-pp"), changes={"normalization": "support"}),
    Row("MAML++, pretrained, transductive", _each("omniglot-maml-pp-pretrained"), targets=(98.47, 98.93, 96.65, 98.33)),
    Row("MAML++, pretrained", _each("omniglot-maml-pp-pretrained"), changes={"normalization": "support"}),
    Row(
        "Reptile, transductive",
        _REPTILE,
        ("97.68 ± 0.04", "99.48 ± 0.06", "89.43 ± 0.14", "97.12 ± 0.32"),
        targets=(96.68, 98.48, 88.43, 96.12),
    ),
    Row(
        "Reptile",
        _REPTILE,
        ("95.39 ± 0.09", "98.90 ± 0.10", "88.14 ± 0.15", "96.65 ± 0.33"),
        targets=(94.39, 97.90, 87.14, 95.65),
        changes={"normalization": "support"},
    ),
)

MINI_IMAGENET = (
    *_baselines(
        _all("mini-imagenet-finetune", MINI_IMAGENET_SETTINGS),
        ("28.86 ± 0.54", "49.79 ± 0.79"),
        nearest=("41.08 ± 0.70", "51.04 ± 0.65"),
    ),
    Row(
        "matching networks, pretrained",
        _by_shots("mini-imagenet-matching"),
        ("43.40 ± 0.78", "51.09 ± 0.71"),
        targets=(42.4, 50.1),
    ),
    Row(
        "meta-LSTM",
        _by_shots("mini-imagenet-meta-lstm"),
        above=_ABOVE,
        changes={"normalization": "support"},
    ),
    Row(
        "meta-LSTM, transductive",
        _by_shots("mini-imagenet-meta-lstm"),
        ("43.44 ± 0.77", "60.60 ± 0.71"),
        ("", "57.76, 58.14"),
        (42.44, 57.76),
        above=_ABOVE_TRANSDUCTIVE,
    ),
    Row(
        "meta-LSTM, pretrained",
        _by_shots("mini-imagenet-meta-lstm-pretrained"),
        above=_ABOVE,
        changes={"normalization": "support"},
    ),
    Row(
        "meta-LSTM, pretrained, transductive",
        _by_shots("mini-imagenet-meta-lstm-pretrained"),
        targets=(42.44, 57.76),
        above=_ABOVE_TRANSDUCTIVE,
    ),
    Row(
        "meta-LSTM of the read-out, pretrained",
        _by_shots("mini-imagenet-meta-lstm-head"),
        above=_ABOVE,
        changes={"normalization": "support"},
    ),
    Row(
        "meta-LSTM of the read-out, pretrained, transductive",
        _by_shots("mini-imagenet-meta-lstm-head"),
        above=_ABOVE_TRANSDUCTIVE,
    ),
    Row(
        "prototypical networks",
        _by_shots("mini-imagenet-protonet"),
        ("49.42 ± 0.78", "68.20 ± 0.66"),
        ("49.1, 47.05", "66.5, 68.56"),
        (49.1, 66.5),
    ),
    Row(
        "prototypical networks, 32 channels, trained 1-shot",
        _all("mini-imagenet-protonet-narrow", MINI_IMAGENET_SETTINGS),
        targets=(49.1, 66.5),
    ),
    Row(
        "MAML, transductive",
        _by_shots("mini-imagenet-maml"),
        ("48.70 ± 1.84", "63.11 ± 0.92"),
        ("48.3, 47.41", "65.4, 65.24"),
        (48.3, 65.4),
    ),
    Row(
        "MAML, pretrained, transductive",
        _by_shots("mini-imagenet-maml-pretrained"),
        targets=(48.3, 65.4),
    ),
    Row("MAML, pretrained", _by_shots("mini-imagenet-maml-pretrained"), changes={"normalization": "support"}),
)
TABLES = {
    "omniglot": Table(
        "Omniglot",
        "the split of Vinyals and Snell, rotations as further classes, 15 queries of each class",
        OMNIGLOT_SETTINGS,
        OMNIGLOT,
    ),
    "mini_imagenet": Table(
        "mini-ImageNet",
        "the split of Ravi and Larochelle, images compressed once more than the original's, 15 queries of each class; "
        "networks of 32 channels, prototypical ones of 64 unless it says 32",
        MINI_IMAGENET_SETTINGS,
        MINI_IMAGENET,
    ),
}

SINUSOID = (
    ("pretrained on all waves", "sinusoid-pretrained"),
    ("MAML", "sinusoid-maml"),
    ("Meta-SGD", "sinusoid-meta-sgd"),
    ("meta-LSTM", "sinusoid-meta-lstm"),
)
SINUSOID_SHOTS = (5, 10, 20)
SINUSOID_STEPS = (1, 5, 10)
"""Gradient steps in evaluation, of methods whose number may differ from training's."""


def opened(folder: Path, recipe: FewShotRecipe, root: Path | None) -> FewShotRun:
    """A run as its folder has it: its seed, its steps, and what it began with."""
    settings = json.loads((folder / "config.json").read_text())
    seed = int(folder.name.rpartition("-seed")[2])
    training = replace(recipe.training, seed=seed, steps=settings["training"]["steps"])
    return Run(replace(recipe, training=training, start=settings.get("start", "")), folder, root)


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, int, FewShotRun]]:
    """Every run in the folder, by recipe and seed."""
    recipes = load_recipes()
    for folder in sorted(arguments.runs.glob("*-seed*")):
        name, _, seed = folder.name.rpartition("-seed")
        if not (folder / "checkpoint.pt").exists() or (arguments.recipe and name not in arguments.recipe):
            continue
        if name not in recipes:
            print(f"{folder}: no recipe of this name any more", flush=True)
            continue
        yield name, int(seed), opened(folder, recipes[name], arguments.root)


def train(arguments: argparse.Namespace) -> None:
    """Go on with the runs named."""
    recipes = load_recipes()
    if unknown := [name for name in arguments.recipe if name not in recipes]:
        raise SystemExit(f"no recipe {', '.join(unknown)}; there are {', '.join(recipes)}")
    for seed in arguments.seeds:
        for name in arguments.recipe:
            recipe = recipes[name]
            steps = arguments.steps or recipe.training.steps
            recipe = replace(recipe, training=replace(recipe.training, seed=seed, steps=steps))
            before = arguments.runs / f"{recipe.start}-seed{seed}"
            if seed and (before / "checkpoint.pt").exists():
                entry = opened(before, recipes[recipe.start], arguments.root).export(arguments.runs / f"seed{seed}")
                recipe = replace(recipe, start=str(entry.path))
            run = Run(recipe, arguments.runs / f"{name}-seed{seed}", arguments.root)
            for record in run.run(arguments.time_limit):
                if "validation" in record:
                    print(f"{name}, seed {seed}: {json.dumps(record)}", flush=True)
            print(f"{name}, seed {seed}: {run.trainer.step} of {recipe.training.steps} steps", flush=True)


def judge(arguments: argparse.Namespace) -> None:
    """Evaluate all runs, saving after each."""
    if not any(arguments.runs.glob("*-seed*/checkpoint.pt")):
        raise SystemExit(f"no run in {arguments.runs}: train first, or name another folder with --runs")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "fewshot.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results["command"] = "python benchmarks/fewshot.py evaluate --root DIR"
    results["torch"] = str(torch.__version__)
    entries = results.setdefault("entries", {})
    for name, seed, run in runs(arguments):
        if not run.trainer.best_step:
            print(f"{name}, seed {seed}: no validation yet, after {run.trainer.step} steps", flush=True)
            continue
        settings = {
            "recipe": name,
            "seed": seed,
            "step": run.trainer.step,
            "steps": run.trainer.recipe.training.steps,
            "best_step": run.trainer.best_step,
            "seconds": round(run.trainer.seconds),
            "commit": run.commit,
        }
        found = sinusoid_results(run, arguments) if name.startswith("sinusoid") else image_results(run, arguments)
        for label, setting, result in found:
            entries[f"{label} | {setting} | {name} seed {seed}"] = {
                "label": label,
                "setting": setting,
                **settings,
                **summary(result),
            }
            print(f"{label}, {setting}, seed {seed}: {result}", flush=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(temporary, file)


def image_results(run: FewShotRun, arguments: argparse.Namespace) -> Iterator[tuple[str, str, Evaluation]]:
    """Every row and setting that a run serves."""
    best = run.trainer.best_learner()
    classes = load_classes(run.trainer.recipe.data, "test", arguments.root)
    validation = load_classes(run.trainer.recipe.data, "validation", arguments.root)
    for row in (row for table in TABLES.values() for row in table.rows):
        if run.trainer.recipe.name not in row.recipes.values():
            continue
        learner, images = on_features(as_row(row, run, best), classes)
        for (ways, shots), name in row.recipes.items():
            if name == run.trainer.recipe.name and ways in arguments.ways and shots in arguments.shots:
                check_frozen(FewShotTask(classes, ways, shots, 15))
                episodes = FewShotTask(images, ways, shots, 15).frozen(arguments.episodes)
                # What a method leaves to validation is chosen for each setting apart, on equally many queries.
                chosen = learner.with_config()
                chosen.choose_settings(FewShotTask(validation, ways, shots, 5).frozen(500 // ways))
                yield row.label, f"{ways}-way {shots}-shot", evaluate(chosen, episodes)


def on_features(learner: Learner, classes: ClassSet) -> tuple[Learner, ClassSet]:
    """The same evaluation with every image through the network once, instead of in every episode that has it.

    Only methods that compare features, and normalize each image by itself, can be judged so; others come back as they
    are.
    """
    if not isinstance(learner, EmbeddingLearner) or learner.config.normalization != "running":
        return learner, classes
    bare = copy.deepcopy(learner).eval()
    network, bare.model.backbone = bare.model.backbone, torch.nn.Flatten()
    places = torch.arange(len(classes.images)).split(256)
    with torch.no_grad():
        features = torch.cat([network(classes.gather(some)).flatten(1) for some in places])
    bare.shape = replace(bare.shape, example_shape=tuple(features.shape[1:]))
    return bare, replace(classes, images=features)


def as_row(row: Row, run: FewShotRun, best: Learner) -> Learner:
    """The best learner of a run under the row's settings, or the row's method on its weights."""
    if row.learner is None:
        return best.with_config(**row.changes)
    # The network alone, where the weights are of a method that has more, or another read-out.
    learner = row.learner.build(run.trainer.recipe.backbone, best.shape).eval()
    own = learner.state_dict()
    shared = {
        name: value
        for name, value in run.trainer.best_weights.items()
        if name in own and own[name].shape == value.shape
    }
    assert all(name in shared for name, _ in learner.named_parameters() if name.startswith("model.backbone."))
    learner.load_state_dict(own | shared)
    return learner


def sinusoid_results(run: FewShotRun, arguments: argparse.Namespace) -> Iterator[tuple[str, str, Evaluation]]:
    """Shots, and steps of evaluation where the method leaves them free."""
    (label,) = (label for label, name in SINUSOID if name == run.trainer.recipe.name)
    best = run.trainer.best_learner()
    fixed = best.config.kind == "meta_lstm"
    for shots in SINUSOID_SHOTS:
        episodes = episode_source("sinusoid", EpisodeShape(shots=shots, queries=100), "test").frozen(arguments.episodes)
        for steps in (None,) if fixed else SINUSOID_STEPS:
            learner = best if steps is None else best.with_config(test_steps=steps)
            yield label, f"{shots}-shot, {learner.steps} step(s)", evaluate(learner, episodes, batch_size=200)


def summary(result: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON; numbers that are not finite become null.

    Accuracies are kept episode by episode, so that methods can be compared on each.
    """
    numbers = {name: getattr(result, name) for name in ("mean", "ci95", "median")}
    return {
        "metric": result.metric,
        **{name: value if abs(value) < float("inf") else None for name, value in numbers.items()},
        "n": result.n,
        "diverged": result.diverged,
        "transductive": result.transductive,
        **({"episodes": " ".join(f"{value:.4g}" for value in result.values)} if result.metric == "accuracy" else {}),
    }


def tables(arguments: argparse.Namespace) -> None:
    """Write the pages."""
    results = json.loads((arguments.out / "fewshot.json").read_text())
    pages = {name: image_table(table, results) for name, table in TABLES.items()}
    for name, text in {**pages, "sinusoid": sinusoid_table(results)}.items():
        (arguments.out / f"fewshot_{name}.md").write_text(text)


def image_table(table: Table, results: dict[str, Any]) -> str:
    """A row per method and setting."""
    lines = [
        f"# {table.title}",
        "",
        f"Accuracy in per cent on {_COMMON} or more frozen test episodes: {table.about}; ± 95 % over episodes; sd: "
        "standard deviation over training seeds. *Transductive*: batch normalization saw all queries of an episode "
        "together. *Steps*: done of those that the run was begun for. *Seconds*: of training by the clock, on one core "
        "shared with other programs; where a row is pretrained, without what it begins with. *Short by*: points below "
        "what is aimed at, the figure that independent code reproduces, or for methods with one figure only, one point "
        "below that; for the meta-LSTM, the best of the baselines, as they are usually run, by the same batch "
        "statistics, and pretrained longer. *Not trained yet*: or not judged yet.",
        "",
        *overview(table, results),
        "",
        "## Each setting, beside published figures",
        "",
        "| method | setting | here | short by | transductive | published | reproduced | steps | seconds |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    # What to train, and for how many steps; None is what the recipe says.
    missing: dict[str, int | None] = {}
    short: dict[str, int | None] = {}
    for row in table.rows:
        for index, (ways, shots) in enumerate(table.settings):
            if (ways, shots) not in row.recipes:
                continue
            setting, recipe = f"{ways}-way {shots}-shot", row.recipes[ways, shots]
            found = _entries(results, row, ways, shots)
            others = " | ".join(figures[index] if figures else "" for figures in (row.published, row.reproduced))
            if found:
                below = _below(table, row, index, results)
                if below > 0:
                    steps = max(entry["steps"] for entry in found)
                    if all(entry["step"] == entry["steps"] for entry in found):
                        short[recipe] = max(40000, 2 * steps)
                    else:
                        missing[recipe] = steps
                done = ", ".join(f"{entry['step']} of {entry['steps']}" for entry in found)
                seconds = ", ".join(str(entry["seconds"]) for entry in found)
                transductive = "yes" if found[0]["transductive"] else "no"
                by = f"{below:.2f}" if below > 0 else ""
                cells = f"{_accuracy(found)} | {by} | {transductive} | {others} | {done} | {seconds}"
            else:
                missing[recipe] = None
                cells = f"not trained yet | | | {others} | | "
            lines.append(f"| {row.label} | {setting} | {cells} |")
    lines += comparison(table, results)
    commands = [
        f"python benchmarks/fewshot.py train {' '.join(name for name in wanted if wanted[name] == steps)} --root DIR "
        + (f"--steps {steps} " * (steps is not None))
        + where
        for wanted, where in ((missing, "--time-limit 3600"), (short, "--runs runs/long"))
        for steps in dict.fromkeys(wanted.values())
    ]
    lines += [
        "",
        "## How to go on",
        "",
        f"Made by `{results['command']}` with torch {results['torch']}; raw results in `fewshot.json`. To go on, or to "
        "begin what is not trained yet; and to train those that are short for longer:",
        "",
        "```sh",
        *commands,
        "python benchmarks/fewshot.py evaluate --root DIR",
        "python benchmarks/fewshot.py evaluate --root DIR --runs runs/long",
        "python benchmarks/fewshot.py table",
        "```",
    ]
    return "\n".join(lines) + "\n"


def overview(table: Table, results: dict[str, Any]) -> list[str]:
    """A line per method, its accuracies alone, all on the same episodes."""
    lines = [
        f"On the first {_COMMON} episodes, which all methods were judged on; what they are short by is counted on all "
        "that a method was judged on.",
        "",
        f"| method | transductive | {' | '.join(f'{ways}-way {shots}-shot' for ways, shots in table.settings)} |",
        "|---|---|" + "--:|" * len(table.settings),
    ]
    for row in table.rows:
        found = [_entries(results, row, *setting) for setting in table.settings]
        if not any(found):
            continue
        below = [_below(table, row, index, results) if found[index] else 0.0 for index in range(len(found))]
        cells = [
            f"{_mean(entries, _COMMON):.2f}{f' (short by {short:.2f})' * (short > 0)}" if entries else ""
            for entries, short in zip(found, below)
        ]
        transductive = next("yes" if entries[0]["transductive"] else "no" for entries in found if entries)
        lines.append(f"| {row.label} | {transductive} | {' | '.join(cells)} |")
    return lines


def _below(table: Table, row: Row, index: int, results: dict[str, Any]) -> float:
    """Points that a row is below what it is aimed at in one setting; nothing or less where it reaches that."""
    rows = {row.label: row for row in table.rows}
    rivals = [_entries(results, rows[label], *table.settings[index]) for label in row.above if label in rows]
    aim = (row.targets[index] if row.targets else None) or 0.0
    found = _mean(_entries(results, row, *table.settings[index]))
    ours = _mean(_entries(results, row, *table.settings[index]), _COMMON)
    return max([aim - found, *(_mean(rival, _COMMON) - ours for rival in rivals if rival)])


def comparison(table: Table, results: dict[str, Any]) -> list[str]:
    """What each row that should be above the baselines is above them by, on the same episodes."""
    rows = {row.label: row for row in table.rows}
    columns = [column for column, label in zip(_COLUMNS, _ABOVE) if label in rows]
    head = [
        "",
        "## Meta-LSTM and baselines, episode by episode",
        "",
        "Differences to the baselines on the same episodes, between the first training seeds, with the 95 % interval "
        "of the mean difference. *Same statistics*: the baseline's batch normalization uses those of the method, the "
        "support set's or all queries'.",
        "",
        f"| method | setting | {' | '.join(columns)} |",
        "|---|---|" + "--:|" * len(columns),
    ]
    lines = []
    for row, (ways, shots) in product(table.rows, table.settings):
        ours = _judged(_entries(results, row, ways, shots))
        rivals = [_judged(_entries(results, rows[label], ways, shots)) for label in row.above if label in rows]
        if ours and any(rivals):
            cells = [_difference(ours, rival) if rival else "" for rival in rivals]
            lines.append(f"| {row.label} | {ways}-way {shots}-shot | {' | '.join(cells)} |")
    return head + lines if lines else []


def _difference(ours: Evaluation, theirs: Evaluation) -> str:
    both = min(ours.n, theirs.n)  # a longer list begins with the shorter one
    ours, theirs = (replace(one, values=one.values[:both]) for one in (ours, theirs))
    mean, ci95 = ours.difference(theirs)
    return f"{100 * mean:+.2f} ± {100 * ci95:.2f}"


def _entries(results: dict[str, Any], row: Row, ways: int, shots: int) -> list[dict[str, Any]]:
    """What was measured for a row in one setting, one for each training seed."""
    wanted = (row.label, f"{ways}-way {shots}-shot", row.recipes.get((ways, shots)))
    return [e for e in results["entries"].values() if (e["label"], e["setting"], e["recipe"]) == wanted]


def _judged(entries: list[dict[str, Any]]) -> Evaluation | None:
    """The first seed's evaluation, if it was kept episode by episode."""
    for entry in entries:
        if entry["seed"] == 0 and "episodes" in entry:
            values = tuple(map(float, entry["episodes"].split()))
            return Evaluation(entry["metric"], values, entry["diverged"], entry["transductive"])
    return None


def _mean(entries: list[dict[str, Any]], first: int | None = None) -> float:
    """Of the accuracies in per cent, over seeds; on the first of the episodes, where there are more."""
    means = [entry["mean"] for entry in entries]
    if first is not None:
        means = [
            statistics.fmean(map(float, entry["episodes"].split()[:first])) if entry["n"] > first else mean
            for entry, mean in zip(entries, means)
        ]
    return 100 * statistics.fmean(means)


def _accuracy(entries: list[dict[str, Any]]) -> str:
    """Mean over seeds, with the widest interval over episodes and the deviation over seeds."""
    means = [100 * entry["mean"] for entry in entries]
    text = f"{statistics.fmean(means):.2f} ± {100 * max(entry['ci95'] for entry in entries):.2f}"
    if (episodes := min(entry["n"] for entry in entries)) > _COMMON:
        text += f" ({episodes} episodes)"
    return text if len(means) < 2 else f"{text}, sd {statistics.stdev(means):.2f} ({len(means)} seeds)"


def sinusoid_table(results: dict[str, Any]) -> str:
    """A row per method and number of steps."""
    lines = [
        "# Sine waves",
        "",
        "Mean squared error on frozen test tasks with 100 query points, trained with 10 shots: mean ± 95 %, "
        "median, number of tasks that diverged (an error of more than ten times the mean square of all targets, or "
        "none at all). Published for MAML with 5 shots after 1, 5 and 10 steps: 0.67, 0.38, 0.35; pretrained on all: "
        "2.41, 2.23, 2.19 (Finn et al. 2017, table 2).",
        "",
        "| method | setting | mean | median | diverged | tasks | steps of training |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for label, name in SINUSOID:
        found = [entry for entry in results["entries"].values() if entry["recipe"] == name]
        if not found:
            lines.append(f"| {label} | | not trained yet: `python benchmarks/fewshot.py train {name}` | | | | |")
        for entry in found:
            mean = "not finite" if entry["mean"] is None else f"{entry['mean']:.3g} ± {entry['ci95']:.2g}"
            median = "not finite" if entry["median"] is None else f"{entry['median']:.3g}"
            lines.append(
                f"| {label} | {entry['setting']} | {mean} | {median} | {entry['diverged']} | {entry['n']} "
                f"| {entry['step']} of {entry['steps']} |"
            )
    lines += ["", f"Made by `{results['command']}` with torch {results['torch']}; raw results in `fewshot.json`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("train", train), ("evaluate", judge), ("table", tables)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
        if name != "table":
            command.add_argument("recipe", nargs="+" if name == "train" else "*", help="by default all that have a run")
            command.add_argument("--runs", type=Path, default=Path("runs/fewshot"))
            command.add_argument("--root", type=Path, help="folder with Omniglot")
        if name == "train":
            command.add_argument("--seeds", type=int, nargs="+", default=[0])
            command.add_argument("--steps", type=int, help="train for so many steps, in place of the recipe's")
            command.add_argument("--time-limit", type=float, default=float("inf"), help="seconds for each run")
        if name == "evaluate":
            command.add_argument("--episodes", type=int, default=_COMMON)
            command.add_argument("--ways", type=int, nargs="+", default=[5, 20], help="settings to judge, on images")
            command.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="likewise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
