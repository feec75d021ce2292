"""``learnedopt meta-train``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from learnedopt.cli.shared import add_command, check_device, polite_signals
from learnedopt.meta import MetaTrainingRun, launched, load_recipe, overridden


def add(commands: Any) -> None:
    """``meta-train``."""
    train = add_command(commands, "meta-train", meta_train, "train a rule by a recipe, going on from where it stopped")
    train.add_argument("recipe", metavar="RECIPE", help="a Python file, or a name in meta_training/")
    training_options(train)


def training_options(train: argparse.ArgumentParser) -> None:
    train.epilog = (
        "Settings of the recipe can be replaced after it, for example --training.updates 100 --rule.hidden-size 8; "
        "--settings lists them. Under torchrun, its processes train together."
    )
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
    recipe = overridden(load_recipe(arguments.recipe), ["--help"] if arguments.settings else arguments.more)
    folder = arguments.out or Path("runs") / recipe.name
    check_device(arguments.device)
    with launched(arguments.device) as device:
        run = MetaTrainingRun(recipe, folder, arguments.root, device, arguments.tensorboard)
        return _train(run, arguments)


def _train(run: MetaTrainingRun, arguments: argparse.Namespace) -> int:
    recipe, folder, trainer = run.recipe, run.folder, run.trainer
    speaks = trainer.ranks.rank == 0
    if speaks:
        together = f" by {trainer.ranks.size} processes" if trainer.ranks.size > 1 else ""
        print(
            f"{recipe.name}: update {trainer.update} of {recipe.training.updates}, in {folder}; {trainer.backend} "
            f"backend{together}",
            flush=True,
        )
    with polite_signals() as received, closing(run.run(arguments.time_limit, lambda: bool(received))) as records:
        for _ in _progress(records, run) if speaks else records:
            pass
    if not speaks:
        return 128 + received[0] if received else 0
    if not trainer.finished:
        again = ["learnedopt", "meta-train", arguments.recipe, "--out", str(folder)]
        if arguments.root is not None:
            again += ["--root", str(arguments.root)]
        if arguments.device != "cpu":
            again += ["--device", arguments.device]
        again += arguments.more
        print(f"stopped at update {trainer.update}, all of it saved; continue with: {shlex.join(again)}")
    if received:
        return 128 + received[0]
    if trainer.best_update:
        print(f"best validation {trainer.best_score:.4g}, at update {trainer.best_update}")
    if arguments.export is not None:
        print(f"exported to {run.export(arguments.export).path}")
    return 0


def _progress(records: Iterator[dict[str, Any]], run: MetaTrainingRun) -> Iterator[dict[str, Any]]:
    """The records, shown as they pass: a bar on a terminal, elsewhere a line every hundred updates."""
    if sys.stderr.isatty():
        yield from _bar(records, run)
        return
    first, started, steps = run.trainer.update, run.trainer.seconds, 0
    for record in records:
        steps += record["steps"]
        if record["update"] % 100 == 0 or "validation" in record:
            seconds = max(record["seconds"] - started, 1e-9)
            speed = (record["update"] - first) / seconds
            left = (run.recipe.training.updates - record["update"]) / speed / 60
            validation = f"  validation {record['validation']:.4g}" if "validation" in record else ""
            print(
                f"update {record['update']}  meta-loss {record['meta_loss']:.4g}  "
                f"{speed:.2f} updates/s  {steps / seconds:.0f} inner steps/s  {left:.0f} min left{validation}",
                flush=True,
            )
        yield record


def _bar(records: Iterator[dict[str, Any]], run: MetaTrainingRun) -> Iterator[dict[str, Any]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'learnedopt[train]'") from error
    validation, started, steps = f"{run.trainer.best_score:.4g}", run.trainer.seconds, 0
    with tqdm(total=run.recipe.training.updates, initial=run.trainer.update, unit="update") as bar:
        for record in records:
            if "validation" in record:
                validation = f"{record['validation']:.4g}"
            steps += record["steps"]
            speed = steps / max(record["seconds"] - started, 1e-9)
            bar.set_postfix_str(
                f"meta-loss {record['meta_loss']:.4g}, validation {validation}, {speed:.0f} inner steps/s",
                refresh=False,
            )
            bar.update()
            yield record
