"""``learnedopt meta-train``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from learnedopt.cli.shared import check_device, conclude, drive, fill_command
from learnedopt.meta import launched, load_recipe, overridden
from learnedopt.runs import Run
from learnedopt.storage import check_about


def add(train: argparse.ArgumentParser, help: str) -> None:
    """``meta-train``."""
    fill_command(train, meta_train, help)
    train.add_argument("recipe", metavar="RECIPE", help="a Python file, or a name in meta_training/")
    training_options(train)


def training_options(train: argparse.ArgumentParser) -> None:
    train.epilog = (
        "Settings of the recipe can be replaced after it, for example --training.updates 100 --rule.hidden-size 8; "
        "--settings lists them. Under torchrun, its processes train together."
    )
    train.set_defaults(more=[])
    train.add_argument("--settings", action="store_true", help="list the settings of the recipe and leave")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="checkpoint and log (runs/ and the recipe's name)")
    train.add_argument("--root", type=Path, metavar="DIR", help="folder of downloaded data, for recipes that need some")
    train.add_argument("--device", default="cpu", help="where to train, e.g. cuda (%(default)s)")
    train.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="stop after the update that passes it"
    )
    train.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    train.add_argument(
        "--export", type=Path, metavar="ZOO_FOLDER", help="write the best rule there as a zoo entry at the end"
    )


def meta_train(arguments: argparse.Namespace) -> int:
    of_zoo = "resume" in arguments
    command = ["zoo", "train"] if of_zoo else ["meta-train"]
    recipe = overridden(load_recipe(arguments.recipe), ["--help"] if arguments.settings else arguments.more)
    folder = arguments.out or Path("runs") / recipe.name
    check_device(arguments.device)
    if arguments.export is not None:
        check_about(recipe.name, recipe.description)
    with launched(arguments.device) as device:
        run = Run(recipe, folder, arguments.root, device, arguments.tensorboard)
        trainer = run.trainer
        if trainer.writes:
            together = f" by {trainer.ranks.size} processes" if trainer.ranks.size > 1 else ""
            print(
                f"{recipe.name}: update {trainer.update} of {trainer.total}, in {folder}; {trainer.backend} "
                f"backend{together}",
                flush=True,
            )
        again = ["learnedopt", *command, arguments.recipe, "--out", str(folder)]
        if arguments.root is not None:
            again += ["--root", str(arguments.root)]
        if arguments.device != "cpu":
            again += ["--device", arguments.device]
        again += ["--resume"] if of_zoo else []
        how = f"continue with: {shlex.join([*again, *arguments.more])}"
        status = drive(run, arguments, how, with_bar=sys.stderr.isatty())
        return conclude(run, arguments, trainer.best_update) if status is None else status
