"""``learnedopt benchmark``: optimizers compared on sets of tasks."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from learnedopt.cli.shared import add_command
from learnedopt.evaluation.benchmark import MULTIPLES, Benchmark, Plan
from learnedopt.evaluation.contenders import BASELINE_NAMES, HAND_WRITTEN
from learnedopt.evaluation.report import write_report
from learnedopt.evaluation.tasks import TASK_SETS
from learnedopt.evaluation.tasks.sets import task_names


def add(benchmark: argparse.ArgumentParser, help: str) -> None:
    """``benchmark list``, ``run`` and ``report``."""
    benchmark_commands = benchmark.add_subparsers(required=True, metavar="COMMAND")
    add_command(benchmark_commands, "list", _list, "the sets of tasks, and the hand-written optimizers")
    run = add_command(benchmark_commands, "run", _run, "run what is missing in a file of results")
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
    report = add_command(benchmark_commands, "report", _report, "a page, pictures and a table from results")
    report.add_argument("results", type=Path, nargs="+", metavar="FILE", help="files of results, read as one")
    report.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (the file's name without its ending)"
    )
    report.add_argument("--tasks", nargs="+", metavar="NAME", help="sets or tasks (all that the file has)")


def _list(arguments: argparse.Namespace) -> int:
    for name, tasks in TASK_SETS.items():
        print(f"{name}:")
        for task in tasks:
            needs = "; needs --root" if task.needs_root else ""
            print(f"  {task.name:<20}{task.kind:<15}{task.distance}{needs}")
    print(f"optimizers:\n  {', '.join(HAND_WRITTEN)}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    plan = Plan(
        horizon=arguments.horizon,
        multiples=tuple(arguments.multiples),
        selection_seeds=arguments.selection_seeds,
        reporting_seeds=arguments.reporting_seeds,
        tuning="none" if arguments.untuned else "all",
        root=arguments.root,
    )
    # Vectorized over copies as it is, a run gains little from a second thread; a second process gains all of it.
    torch.set_num_threads(1)
    options = ["--horizon", str(plan.horizon), "--multiples", *map(str, plan.multiples)]
    seeds = {"--selection-seeds": plan.selection_seeds, "--reporting-seeds": plan.reporting_seeds}
    options += [text for name, count in seeds.items() for text in (name, str(count))]
    options += ["--untuned"] if arguments.untuned else []
    command = ["learnedopt", "benchmark", "run", "--tasks", *arguments.tasks, "--optimizers", *arguments.optimizers]
    benchmark = Benchmark(arguments.out, arguments.tasks, arguments.optimizers, plan, shlex.join([*command, *options]))
    skipped: list[str] = []
    for line in benchmark.run(arguments.processes):
        print(line, flush=True)
        if line.startswith("skipped "):
            skipped.append(line.removeprefix("skipped ").partition(": ")[0])
    if missing := _missing(skipped, arguments):
        raise ValueError(f"not run, though asked for by name: {', '.join(missing)}")
    return 0


def _missing(skipped: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """What was skipped and should not be: what was named itself, or everything. Of a set what can run is enough."""
    everything = set(task_names(arguments.tasks)) <= {*skipped} or {*arguments.optimizers} <= {*skipped}
    return [name for name in skipped if everything or name in (*arguments.tasks, *arguments.optimizers)]


def _report(arguments: argparse.Namespace) -> int:
    out = arguments.out or arguments.results[0].with_suffix("")
    print(write_report(arguments.results, out, arguments.tasks))
    print(f"Page: {out / 'index.html'}")
    return 0
