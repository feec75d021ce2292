"""``learnedopt fewshot``: learners trained and judged."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from learnedopt import fewshot
from learnedopt.cli.demos import add_fewshot_demo
from learnedopt.cli.shared import add_command, check_device, conclude, drive
from learnedopt.runs import Run
from learnedopt.storage import check_about


def add(few_shot: argparse.ArgumentParser, help: str) -> None:
    """``fewshot list``, ``demo``, ``train`` and ``evaluate``."""
    fewshot_commands = few_shot.add_subparsers(required=True, metavar="COMMAND")
    add_command(fewshot_commands, "list", _list, "methods, trained learners, data sets and recipes")
    add_fewshot_demo(fewshot_commands)
    learn = add_command(
        fewshot_commands, "train", fewshot_train, "train a learner by a recipe, going on from where it stopped"
    )
    learn.add_argument("recipe", metavar="RECIPE", help="a name in meta_training/fewshot/, or FILE.py:NAME")
    learn.add_argument("--out", type=Path, metavar="FOLDER", help="checkpoint and log (runs/, recipe and seed)")
    learn.add_argument("--seed", type=int, help="another seed than the recipe's")
    learn.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    learn.add_argument("--device", default="cpu", help="where to train, e.g. cuda (%(default)s)")
    learn.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="stop after the step that passes it"
    )
    learn.add_argument(
        "--export", type=Path, metavar="ZOO_FOLDER", help="write the best learner there as an entry at the end"
    )
    judge = add_command(fewshot_commands, "evaluate", _evaluate, "judge a trained learner on frozen test episodes")
    judge.add_argument("name", metavar="NAME", help="a trained learner of the zoo, or an entry's folder")
    judge.add_argument("--data", help="a data set (the one it was trained on)")
    judge.add_argument("--ways", type=_at_least(2), help="classes in an episode (those it was made for)")
    judge.add_argument("--shots", type=_at_least(1), help="support examples of each class (those it was made for)")
    judge.add_argument("--queries", type=_at_least(1), default=15, help="query examples of each class (%(default)s)")
    judge.add_argument("--episodes", type=_at_least(1), default=600, help="how many of the frozen list (%(default)s)")
    judge.add_argument("--normalization", help="another use of batch statistics: transductive, support or running")
    for command in (learn, judge):
        command.add_argument("--root", type=Path, metavar="DIR", help="folder of downloaded data, if it needs some")


def _at_least(least: int) -> Callable[[str], int]:
    """What argparse converts a number with."""

    def integer(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return integer


def _list(arguments: argparse.Namespace) -> int:
    print("methods:         " + ", ".join(fewshot.LEARNERS))
    print("data sets:       " + ", ".join([*fewshot.DATASETS, "sinusoid"]))
    for entry in map(fewshot.learner_info, fewshot.list_learners()):
        print(f"trained learner: {entry.name}: {entry.description}")
    try:
        recipes = list(fewshot.load_recipes())
    except FileNotFoundError:  # away from a checkout there are none
        return 0
    print("recipes:         " + ", ".join(recipes))
    return 0


def fewshot_train(arguments: argparse.Namespace) -> int:
    recipe = fewshot.load_fewshot_recipe(arguments.recipe)
    changes = {name: getattr(arguments, name) for name in ("seed", "steps") if getattr(arguments, name) is not None}
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
    folder = arguments.out or Path("runs") / f"{recipe.name}-seed{recipe.training.seed}"
    check_device(arguments.device)
    if arguments.export is not None:
        check_about(recipe.name, recipe.description)
        fewshot.check_known(recipe.learner, recipe.backbone)
    run = Run(recipe, folder, arguments.root, arguments.device)
    trainer = run.trainer
    print(f"{recipe.name}: step {trainer.step} of {trainer.total}, in {folder}", flush=True)
    status = drive(run, arguments, "the same command continues")
    if status is not None:
        return status
    if trainer.skipped:
        print(f"{trainer.skipped} step(s) skipped, as their gradient or statistics were not finite")
    if trainer.finished and not trainer.best_step:
        raise fewshot.TrainingError("no validation had a finite error: lower the learning rates, or clip the gradient")
    return conclude(run, arguments, trainer.best_step)


def _evaluate(arguments: argparse.Namespace) -> int:
    entry, learner = fewshot.learner_info(arguments.name), fewshot.load_learner(arguments.name)
    if arguments.normalization is not None:
        learner = learner.with_config(normalization=arguments.normalization)
    made_for = entry.training.get("test", {})
    data = arguments.data or entry.training.get("data")
    ways, shots = arguments.ways or made_for.get("ways"), arguments.shots or made_for.get("shots")
    if data is None or ways is None or shots is None:
        raise ValueError(f"{entry.name} does not say what it was trained for: give --data, --ways and --shots")
    shape = fewshot.EpisodeShape(ways, shots, arguments.queries)
    source = fewshot.episode_source(data, shape, "test", arguments.root)
    if isinstance(source, fewshot.FewShotTask):
        fewshot.check_frozen(source)
    result = fewshot.evaluate(learner, source.frozen(arguments.episodes))
    setting = f"{ways}-way {shots}-shot" if source.ways is not None else f"{shots}-shot"
    transductive = "transductive" if result.transductive else "not transductive"
    print(f"{entry.name} on {data}, {setting}: {result} ({result.metric}, {result.n} episodes, {transductive})")
    return 0
