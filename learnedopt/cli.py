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
from learnedopt.meta import MetaTrainingError, MetaTrainingRun, load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 if all went well, 1 if meta-training failed, 2 if something asked for does not exist or makes no sense, 128 plus
    the signal's number if a signal stopped it.
    """
    arguments = _parser().parse_args(argv)
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
    train.add_argument("recipe", metavar="RECIPE", help="a Python file, or a name in meta_training/")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="checkpoint and log (runs/ and the recipe's name)")
    train.add_argument("--root", type=Path, metavar="DIR", help="folder of downloaded data, for recipes that need some")
    train.add_argument("--device", default="cpu", help="where to train, e.g. cuda (%(default)s)")
    train.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="stop after the update that passes it"
    )
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
    recipe = load_recipe(arguments.recipe)
    folder = arguments.out or Path("runs") / recipe.name
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"cannot train on device {arguments.device!r}: {error}") from error
    run = MetaTrainingRun(recipe, folder, arguments.root, arguments.device)
    print(f"{recipe.name}: update {run.trainer.update} of {recipe.training.updates}, in {folder}", flush=True)
    with _polite_signals() as received, closing(run.run(arguments.time_limit)) as records:
        for _ in _progress(records, run):
            if received:
                break
    if not run.trainer.finished:
        again = ["learnedopt", "meta-train", arguments.recipe, "--out", str(folder)]
        if arguments.root is not None:
            again += ["--root", str(arguments.root)]
        if arguments.device != "cpu":
            again += ["--device", arguments.device]
        print(f"stopped at update {run.trainer.update}, all of it saved; continue with: {shlex.join(again)}")
    if received:
        return 128 + received[0]
    if run.trainer.best_update:
        print(f"best validation {run.trainer.best_score:.4g}, at update {run.trainer.best_update}")
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
    first, started = run.trainer.update, run.trainer.seconds
    for record in records:
        if record["update"] % 100 == 0 or "validation" in record:
            speed = (record["update"] - first) / max(record["seconds"] - started, 1e-9)
            left = (run.recipe.training.updates - record["update"]) / speed / 60
            validation = f"  validation {record['validation']:.4g}" if "validation" in record else ""
            print(
                f"update {record['update']}  meta-loss {record['meta_loss']:.4g}  "
                f"{speed:.2f} updates/s  {left:.0f} min left{validation}",
                flush=True,
            )
        yield record


def _bar(records: Iterator[dict[str, Any]], run: MetaTrainingRun) -> Iterator[dict[str, Any]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'learnedopt[train]'") from error
    validation = f"{run.trainer.best_score:.4g}"
    with tqdm(total=run.recipe.training.updates, initial=run.trainer.update, unit="update") as bar:
        for record in records:
            if "validation" in record:
                validation = f"{record['validation']:.4g}"
            bar.set_postfix_str(f"meta-loss {record['meta_loss']:.4g}, validation {validation}", refresh=False)
            bar.update()
            yield record


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
