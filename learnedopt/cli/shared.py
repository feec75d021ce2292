"""What several commands share."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


def add_command(commands: Any, name: str, function: Callable[[argparse.Namespace], int], help: str) -> Any:
    """A command, and its parser to add options to."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def check_device(device: str) -> None:
    """Raises ``ValueError`` if there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"cannot train on device {device!r}: {error}") from error


@contextmanager
def polite_signals() -> Iterator[list[int]]:
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
