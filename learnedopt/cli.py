"""The command line: ``learnedopt demo``, ``zoo``, ``meta-train``, ``benchmark``, ``fewshot``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learnedopt import __version__, fewshot, zoo
from learnedopt.demo import Demo, compare, plot, table
from learnedopt.evaluation.benchmark import MULTIPLES, Benchmark, Plan
from learnedopt.evaluation.contenders import BASELINE_NAMES, HAND_WRITTEN
from learnedopt.evaluation.report import write_report
from learnedopt.evaluation.tasks import TASK_SETS
from learnedopt.fewshot import demo as fewshot_demo
from learnedopt.fewshot.demo import FewShotDemo
from learnedopt.meta import MetaTrainingError, launched, load_recipe, overridden
from learnedopt.rules import UpdateRule
from learnedopt.runs import Run, bar, lines, polite_signals

_BROKEN_PIPE = 128 + 13  # the number of SIGPIPE, which Windows does not know


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 if all went well, 1 if meta-training failed, 2 if something asked for does not exist or makes no sense, 128 plus
    the signal's number if a signal stopped it, 141 (that of a broken pipe) if nobody reads the output any more.
    """
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if arguments.command in (_meta_train, _zoo_train):
        arguments.more = more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` has. Python writes the rest at exit: let it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (MetaTrainingError, fewshot.TrainingError) as error:
        return _fail(error, 1)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learnedopt", description="Learned optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"learnedopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "train small networks with the default rule, Adam and SGD, and compare")
    demo.add_argument("--out", type=Path, default=Path("learnedopt-demo.png"), help="picture to write (%(default)s)")

    entries = commands.add_parser("zoo", help="the trained rules and few-shot learners that come with the package")
    entry_commands = entries.add_subparsers(required=True, metavar="COMMAND")
    _command(entry_commands, "list", _zoo_list, "their names, those of learners last")
    show = _command(entry_commands, "show", _zoo_show, "how one was made, what it is good at and where it fails")
    show.add_argument("name", metavar="NAME", help="a name in the zoo, or an entry's folder")

    again = _command(entry_commands, "train", _zoo_train, "train an entry of the zoo again, by the recipe that made it")
    again.add_argument("recipe", metavar="NAME", help="a name in the zoo")
    again.add_argument("--resume", action="store_true", help="go on with the run in --out, from where it stopped")
    _training_options(again)

    train = _command(commands, "meta-train", _meta_train, "train a rule by a recipe, going on from where it stopped")
    train.add_argument("recipe", metavar="RECIPE", help="a Python file, or a name in meta_training/")
    _training_options(train)
    _benchmark_commands(commands)
    _fewshot_commands(commands)
    return parser


def _training_options(train: argparse.ArgumentParser) -> None:
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


def _fewshot_commands(commands: Any) -> None:
    fewshot = commands.add_parser("fewshot", help="few-shot learning: train, evaluate, compare")
    fewshot_commands = fewshot.add_subparsers(required=True, metavar="COMMAND")
    _command(fewshot_commands, "list", _fewshot_list, "methods, trained learners, data sets and recipes")
    compared = _command(
        fewshot_commands, "demo", _fewshot_demo, "train five methods on drawn characters, and compare them"
    )
    compared.add_argument(
        "--out", type=Path, default=Path("learnedopt-fewshot.png"), help="picture of an episode (%(default)s)"
    )
    learn = _command(
        fewshot_commands, "train", _fewshot_train, "train a learner by a recipe, going on from where it stopped"
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
    judge = _command(fewshot_commands, "evaluate", _fewshot_evaluate, "judge a trained learner on frozen test episodes")
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


def _benchmark_commands(commands: Any) -> None:
    benchmark = commands.add_parser("benchmark", help="optimizers compared on sets of tasks, tuned and untuned")
    benchmark_commands = benchmark.add_subparsers(required=True, metavar="COMMAND")
    _command(benchmark_commands, "list", _benchmark_list, "the sets of tasks, and the hand-written optimizers")
    run = _command(benchmark_commands, "run", _benchmark_run, "run what is missing in a file of results")
    run.epilog = "Stop it at any time: the same command goes on from there."
    run.add_argument(
        "--tasks", nargs="+", default=["heldout"], metavar="NAME", help="sets or tasks, or module:FAMILY (heldout)"
    )
    run.add_argument(
        "--optimizers",
        nargs="+",
        default=[*BASELINE_NAMES, "default"],
        metavar="NAME",
        help="hand-written ones, entries of the zoo, folders of entries, or module:Class (the baselines and default)",
    )
    run.add_argument("--out", type=Path, default=Path("benchmark.jsonl"), help="file of results (%(default)s)")
    run.add_argument("--horizon", type=int, default=500, metavar="STEPS", help="what counts as 1x (%(default)s)")
    run.add_argument(
        "--multiples", type=int, nargs="+", default=[1], choices=MULTIPLES, help="of the horizon, to judge at (1)"
    )
    run.add_argument("--untuned", action="store_true", help="run defaults only")
    run.add_argument("--selection-seeds", type=int, default=2, metavar="N", help="to tune on (%(default)s)")
    run.add_argument("--reporting-seeds", type=int, default=10, metavar="N", help="to judge on (%(default)s)")
    run.add_argument("--root", type=Path, metavar="DIR", help="folder of downloaded data, for tasks that need some")
    run.add_argument("--processes", type=int, default=1, metavar="N", help="tasks run side by side (%(default)s)")
    report = _command(benchmark_commands, "report", _benchmark_report, "a page, pictures and a table from results")
    report.add_argument("results", type=Path, nargs="+", metavar="FILE", help="files of results, read as one")
    report.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (the file's name without its ending)"
    )
    report.add_argument("--tasks", nargs="+", metavar="NAME", help="sets or tasks (all that the file has)")


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
    rules = [zoo.entry_info(name) for name in zoo.list_entries()]
    learners = [fewshot.learner_info(name) for name in fewshot.list_learners()]
    for entries in (rules, learners):
        width = max((len(entry.name) for entry in entries), default=0)
        for entry in entries:
            print(f"{entry.name:<{width}}  {entry.description}")
    return 0


def _zoo_show(arguments: argparse.Namespace) -> int:
    if arguments.name in fewshot.list_learners() or _is_learner(arguments.name):
        return _zoo_show_learner(arguments.name)
    entry, rule = zoo.entry_info(arguments.name), zoo.load_rule(arguments.name)
    facts: dict[str, object] = {
        "folder": entry.path,
        "sha256": entry.sha256,
        "rule": _settings(entry.config.to_dict()),
        "meta-parameters": sum(weight.numel() for weight in rule.parameters()),
        "state": _state(rule),
        "meta-training": _settings(entry.meta_training),
    }
    _print_entry(facts, entry.card)
    return 0


def _is_learner(folder: str) -> bool:
    try:
        fewshot.learner_info(folder)
    except zoo.ZooError:
        return False
    return True


def _zoo_show_learner(name: str) -> int:
    entry, learner = fewshot.learner_info(name), fewshot.load_learner(name)
    facts: dict[str, object] = {
        "folder": entry.path,
        "sha256": entry.sha256,
        "learner": _settings(entry.learner.to_dict()),
        "backbone": _settings(entry.backbone.to_dict()),
        "weights": sum(weight.numel() for weight in learner.parameters()),
        "training": _settings(entry.training),
    }
    _print_entry(facts, entry.card)
    return 0


def _print_entry(facts: Mapping[str, object], card: str) -> None:
    for name, value in facts.items():
        print(f"{name + ':':<17}{value}")
    print(f"\n{card.rstrip()}")


def _state(rule: UpdateRule) -> str:
    said, side = f"{rule.state_bytes_per_parameter()} bytes per parameter in float32", 128
    matrices = sum(rows * columns for rows, columns in rule.matrices((side, side)).values())
    return f"{said}, and {4 * matrices // side**2} more in matrices that are square" if matrices else said


def _zoo_train(arguments: argparse.Namespace) -> int:
    is_learner = arguments.recipe in fewshot.list_learners()
    if not is_learner:
        zoo.entry_info(arguments.recipe)
    folder = arguments.out or Path("runs") / arguments.recipe
    there = (folder / "checkpoint.pt").exists()
    if there and not arguments.resume and not arguments.settings:
        raise ValueError(f"{folder} holds a run already: go on with it by --resume, or give another --out")
    if arguments.resume and not there:
        raise ValueError(f"there is no run to resume in {folder}: leave out --resume, or say where by --out")
    if not is_learner:
        return _meta_train(arguments)
    if arguments.more or arguments.settings or arguments.tensorboard:
        raise ValueError(
            f"{arguments.recipe} is a few-shot learner, and settings of its recipe cannot be replaced here: "
            "`learnedopt fewshot train` has options for seed and steps, and takes recipes of your own"
        )
    return _fewshot_train(argparse.Namespace(**vars(arguments) | {"out": folder, "seed": None, "steps": None}))


def _benchmark_list(arguments: argparse.Namespace) -> int:
    for name, tasks in TASK_SETS.items():
        print(f"{name}:")
        for task in tasks:
            needs = "; needs --root" if task.needs_root else ""
            print(f"  {task.name:<20}{task.kind:<15}{task.distance}{needs}")
    print(f"optimizers:\n  {', '.join(HAND_WRITTEN)}")
    return 0


def _benchmark_run(arguments: argparse.Namespace) -> int:
    plan = Plan(
        horizon=arguments.horizon,
        multiples=tuple(arguments.multiples),
        selection_seeds=arguments.selection_seeds,
        reporting_seeds=arguments.reporting_seeds,
        tuning="none" if arguments.untuned else "all",
        root=arguments.root,
    )
    # Vectorised over copies as it is, a run gains little from a second thread; a second process gains all of it.
    torch.set_num_threads(1)
    options = ["--horizon", str(plan.horizon), "--multiples", *map(str, plan.multiples)]
    seeds = {"--selection-seeds": plan.selection_seeds, "--reporting-seeds": plan.reporting_seeds}
    options += [text for name, count in seeds.items() for text in (name, str(count))]
    options += ["--untuned"] if arguments.untuned else []
    command = ["learnedopt", "benchmark", "run", "--tasks", *arguments.tasks, "--optimizers", *arguments.optimizers]
    benchmark = Benchmark(arguments.out, arguments.tasks, arguments.optimizers, plan, shlex.join([*command, *options]))
    for line in benchmark.run(arguments.processes):
        print(line, flush=True)
    return 0


def _benchmark_report(arguments: argparse.Namespace) -> int:
    out = arguments.out or arguments.results[0].with_suffix("")
    print(write_report(arguments.results, out, arguments.tasks))
    print(f"Page: {out / 'index.html'}")
    return 0


def _settings(values: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"cannot train on device {device!r}: {error}") from error


def _meta_train(arguments: argparse.Namespace) -> int:
    recipe = overridden(load_recipe(arguments.recipe), ["--help"] if arguments.settings else arguments.more)
    folder = arguments.out or Path("runs") / recipe.name
    _check_device(arguments.device)
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
        again = ["learnedopt", "meta-train", arguments.recipe, "--out", str(folder)]
        if arguments.root is not None:
            again += ["--root", str(arguments.root)]
        if arguments.device != "cpu":
            again += ["--device", arguments.device]
        how = f"continue with: {shlex.join([*again, *arguments.more])}"
        status = _drive(run, arguments, how, with_bar=sys.stderr.isatty())
        return _conclude(run, arguments, trainer.best_update) if status is None else status


def _drive(run: Run[Any, Any], arguments: argparse.Namespace, again: str, with_bar: bool = False) -> int | None:
    """Train on, showing how it goes, and say how to continue; the exit status, if there is no more to do."""
    trainer, say = run.trainer, partial(print, flush=True)
    with polite_signals() as received, closing(run.run(arguments.time_limit, lambda: bool(received))) as records:
        shown: Iterator[Any] = records
        if trainer.writes:
            shown = bar(records, trainer) if with_bar else lines(records, trainer, say)
        for _ in shown:
            pass
    if trainer.writes and not trainer.finished:
        print(f"stopped at {trainer.unit} {trainer.done}, all of it saved; {again}")
    if received:
        return 128 + received[0]
    return None if trainer.writes else 0


def _conclude(run: Run[Any, Any], arguments: argparse.Namespace, best: int) -> int:
    if best:
        print(f"best validation {run.trainer.best_score:.4g}, at {run.trainer.unit} {best}")
    if arguments.export is not None:
        print(f"exported to {run.export(arguments.export).path}")
    return 0


def _fewshot_list(arguments: argparse.Namespace) -> int:
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


def _fewshot_demo(arguments: argparse.Namespace) -> int:
    demo = FewShotDemo()
    torch.set_num_threads(1)
    print(
        f"Characters of scripts never seen in training, {demo.test.ways}-way {demo.test.shots}-shot, {demo.episodes} "
        "test episodes, the same for all. This takes a few minutes.",
        flush=True,
    )
    episode, seconds = fewshot_demo.timed(demo)
    fewshot_demo.plot(episode, arguments.out)
    print(f"Drawn in {seconds:.0f} s. An episode: {arguments.out}\n", flush=True)
    results = []
    for name, recipe in fewshot_demo.methods(demo):
        for result in fewshot_demo.compare(demo, name, recipe):
            print(f"{result.name}: {result.evaluation}", flush=True)
            results.append(result)
    print(f"\n{fewshot_demo.table(results)}")
    print("±: 95 % interval over episodes. Transductive: saw all queries of an episode together.")
    return 0


def _fewshot_train(arguments: argparse.Namespace) -> int:
    recipe = fewshot.load_fewshot_recipe(arguments.recipe)
    changes = {name: getattr(arguments, name) for name in ("seed", "steps") if getattr(arguments, name) is not None}
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
    training = recipe.training
    folder = arguments.out or Path("runs") / f"{recipe.name}-seed{training.seed}"
    _check_device(arguments.device)
    if arguments.export is not None:
        fewshot.check_known(recipe.learner, recipe.backbone)
    run = Run(recipe, folder, arguments.root, arguments.device)
    trainer = run.trainer
    print(f"{recipe.name}: step {trainer.step} of {trainer.total}, in {folder}", flush=True)
    status = _drive(run, arguments, "the same command continues")
    if status is not None:
        return status
    if trainer.skipped:
        print(f"{trainer.skipped} step(s) skipped, as their gradient or statistics were not finite")
    if trainer.finished and not trainer.best_step:
        raise fewshot.TrainingError("no validation had a finite error: lower the learning rates, or clip the gradient")
    return _conclude(run, arguments, trainer.best_step)


def _fewshot_evaluate(arguments: argparse.Namespace) -> int:
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


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
