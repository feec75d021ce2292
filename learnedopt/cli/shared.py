"""What several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch

from learnedopt.runs import Run, bar, lines, polite_signals


def add_command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> Any:
    """A command, and its parser to add options to."""
    return fill_command(commands.add_parser(name, help=help), function, help)


def fill_command(parser: Any, function: Callable[[argparse.Namespace], int], help: str) -> Any:
    """A parser as that of a command."""
    parser.description = help[0].upper() + help[1:] + "."
    parser.set_defaults(command=function)
    return parser


def check_device(device: str) -> None:
    """Raises ``ValueError`` if there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"cannot train on device {device!r}: {error}") from error


def drive(run: Run[Any, Any], arguments: argparse.Namespace, again: str, with_bar: bool = False) -> int | None:
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


def conclude(run: Run[Any, Any], arguments: argparse.Namespace, best: int) -> int:
    """Say what the best was, and export it where that was asked for; the exit status."""
    if best:
        print(f"best validation {run.trainer.best_score:.4g}, at {run.trainer.unit} {best}")
    if arguments.export is not None:
        print(f"exported to {run.export(arguments.export).path}")
    return 0
