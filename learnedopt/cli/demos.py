"""``learnedopt demo`` and ``learnedopt fewshot demo``."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learnedopt.cli.shared import add_command, fill_command
from learnedopt.demo import Demo, compare, count, plot, table
from learnedopt.fewshot import demo as fewshot_demo
from learnedopt.fewshot.demo import FewShotDemo
from learnedopt.runs import Countdown


def add_demo(demo: argparse.ArgumentParser, help: str) -> None:
    """``demo``."""
    fill_command(demo, _demo, help)
    demo.add_argument("--out", type=Path, default=Path("learnedopt-demo.png"), help="picture to write (%(default)s)")


def add_fewshot_demo(commands: Any) -> None:
    """``fewshot demo``."""
    compared = add_command(commands, "demo", _fewshot_demo, "train five methods on drawn characters, and compare them")
    compared.add_argument(
        "--out", type=Path, default=Path("learnedopt-fewshot.png"), help="picture of an episode (%(default)s)"
    )


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
    progress = Countdown(count(demo), partial(_say, ""))
    for activation, widths in demo.networks:
        panels.append(compare(demo, activation, widths, progress.advance))
        print(table(panels[-1]) + "\n", flush=True)
    plot(panels, arguments.out)
    print(f"Curves: {arguments.out}")
    return 0


def _say(about: str, line: str) -> None:
    print(f"{about}{line}", file=sys.stderr, flush=True)


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
        progress = Countdown(recipe.training.steps, partial(_say, f"{name}: training, "))
        for result in fewshot_demo.compare(demo, name, recipe, progress.advance):
            print(f"{result.name}: {result.evaluation}", flush=True)
            results.append(result)
    print(f"\n{fewshot_demo.table(results)}")
    print("±: 95 % interval over episodes. Transductive: saw all queries of an episode together.")
    return 0
