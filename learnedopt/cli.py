"""The command line: ``learnedopt demo``, ``zoo list``, ``zoo show``, ``meta-train``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from learnedopt import __version__, zoo
from learnedopt.demo import Demo, compare, plot, table
from learnedopt.meta import MetaTrainingError, MetaTrainingRun, launched, load_recipe, overridden


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 if all went well, 1 if meta-training failed, 2 if something asked for does not exist or makes no sense, 128 plus
    the signal's number if a signal stopped it.
    """
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if arguments.command is _meta_train:
        arguments.more = more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        return int(arguments.command(arguments))
    except MetaTrainingError as error:
        return _fail(error, 1)
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learnedopt", description="Learned optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"learnedopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "train small networks with the default rule, Adam and SGD, and compare")
    demo.add_argument("--out", type=Path, default=Path("learnedopt-demo.png"), help="picture to write (%(default)s)")

    entries = commands.add_parser("zoo", help="the trained rules that come with the package")
    entry_commands = entries.add_subparsers(required=True, metavar="COMMAND")
    _command(entry_commands, "list", _zoo_list, "their names")
    show = _command(entry_commands, "show", _zoo_show, "how one was made, what it is good at and where it fails")
    show.add_argument("name", metavar="NAME", help="a name in the zoo, or an entry's folder")

    train = _command(commands, "meta-train", _meta_train, "train a rule by a recipe, going on from where it stopped")
    train.epilog = (
        "Settings of the recipe can be replaced after it, for example --training.updates 100 --rule.hidden-size 8; "
        "RECIPE --settings lists them. Under torchrun, its processes train together."
    )
    train.add_argument("recipe", metavar="RECIPE", help="a Python file, or a name in meta_training/")
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
    return parser


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> Any:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    demo = Demo()
    print(
        f"Digits of 8 x 8 pixels, {demo.steps} steps, batches of {demo.batch_size}. Median of {len(demo.seeds)} seeds "
        f"[lowest, highest].\nThe learning rates of the tuned ones: best of {len(demo.adam_rates)} on "
        f"{len(demo.tuning_seeds)} other seeds. This takes about a minute.\n",
        flush=True,
    )
    # Networks this small gain nothing from a second thread, and lose much where another program runs.
    torch.set_num_threads(1)
    panels = []
    for activation, widths in demo.networks:
        panels.append(compare(demo, activation, widths))
        print(table(panels[-1]) + "\n", flush=True)
    plot(panels, arguments.out)
    print(f"Curves: {arguments.out}")
    return 0


def _zoo_list(arguments: argparse.Namespace) -> int:
    entries = [zoo.entry_info(name) for name in zoo.list_entries()]
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.description}")
    return 0


def _zoo_show(arguments: argparse.Namespace) -> int:
    entry, rule = zoo.entry_info(arguments.name), zoo.load_rule(arguments.name)
    facts: dict[str, object] = {
        "folder": entry.path,
        "sha256": entry.sha256,
        "rule": _settings(entry.config.to_dict()),
        "meta-parameters": sum(weight.numel() for weight in rule.parameters()),
        "state": f"{rule.state_bytes_per_parameter()} bytes per parameter in float32",
        "meta-training": _settings(entry.meta_training),
    }
    for name, value in facts.items():
        print(f"{name + ':':<17}{value}")
    print(f"\n{entry.card.rstrip()}")
    return 0


def _settings(values: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _meta_train(arguments: argparse.Namespace) -> int:
    recipe = overridden(load_recipe(arguments.recipe), ["--help"] if arguments.settings else arguments.more)
    folder = arguments.out or Path("runs") / recipe.name
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"cannot train on device {arguments.device!r}: {error}") from error
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
    with _polite_signals() as received, closing(run.run(arguments.time_limit, lambda: bool(received))) as records:
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


@contextmanager
def _polite_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, for the caller to stop between two updates; a second one acts as usual."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


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


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
