"""While something is trained: records shown as they pass, and signals that stop it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from learnedopt.runs.folder import Record
from learnedopt.runs.run import Trainable

_EVERY = 10.0
"""Seconds between two lines about a part."""


def lines(records: Iterator[Record], trainer: Trainable, say: Callable[[str], None]) -> Iterator[Record]:
    """The records; ``say`` gets a line for every hundredth, for every validation, and now and then for a part."""
    unit, first, started, steps = trainer.unit, trainer.done, trainer.seconds, 0
    shown, before = time.monotonic(), None

    def part(record: Record) -> None:
        nonlocal shown, before
        at = record[unit] - 1 + record["part"]
        if before is None:
            before = at, record["seconds"]
        if "gain" not in record and time.monotonic() - shown < _EVERY:
            return
        shown = time.monotonic()
        text = f"{unit} {record[unit]}, {100 * record['part']:.0f} %  {_part(record)}  {record['seconds']:.0f} s"
        if at > before[0]:
            left = (trainer.total - at) * (record["seconds"] - before[1]) / (at - before[0]) / 60
            text += f"  {left:.0f} min left"
        say(text)

    trainer.listeners.append(part)
    for record in records:
        steps += record.get("steps", 0)
        if record[unit] % 100 == 0 or "validation" in record:
            pace = f"{record['seconds']:.0f} s"
            if steps:
                seconds = max(record["seconds"] - started, 1e-9)
                speed = (record[unit] - first) / seconds
                left = (trainer.total - record[unit]) / speed / 60
                pace = f"{speed:.2f} {unit}s/s  {steps / seconds:.0f} inner steps/s  {left:.0f} min left"
            validation = f"  validation {record['validation']:.4g}" if "validation" in record else ""
            say(f"{unit} {record[unit]}  {_loss(record, trainer)}  {pace}{validation}")
        yield record


def bar(records: Iterator[Record], trainer: Trainable) -> Iterator[Record]:
    """The records; a bar on a terminal moves with them. Raises ``ImportError`` without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'learnedopt[train]'") from error
    judged = math.isfinite(trainer.best_score)
    validation = f"validation {trainer.best_score:.4g}" if judged else "no validation yet"
    started, steps = trainer.seconds, 0
    with tqdm(total=trainer.total, initial=trainer.done, unit=trainer.unit) as shown:

        def part(record: Record) -> None:
            shown.set_postfix_str(_part(record), refresh=False)
            shown.update(record[trainer.unit] - 1 + record["part"] - shown.n)

        trainer.listeners.append(part)
        for record in records:
            if "validation" in record:
                validation = f"validation {record['validation']:.4g}"
            steps += record.get("steps", 0)
            speed = steps / max(record["seconds"] - started, 1e-9)
            shown.set_postfix_str(f"{_loss(record, trainer)}, {validation}, {speed:.0f} inner steps/s", refresh=False)
            shown.update(record[trainer.unit] - shown.n)
            yield record


def _part(record: Record) -> str:
    judged = f": loss {record['end']:.4g}, the start's {record['start']:.4g}" if "gain" in record else ""
    return f"{record['task']}{judged}"


def _loss(record: Record, trainer: Trainable) -> str:
    return f"{trainer.loss.replace('_', '-')} {record[trainer.loss]:.4g}"


class Countdown:
    """Says what share of so much work is done, and how many seconds are left, at most every :data:`_EVERY` seconds.

    Args:
        total: How much there is to do, in any unit.
        say: Is given a line.
    """

    def __init__(self, total: float, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0.0
        self._started = self._shown = time.monotonic()

    def advance(self, work: float = 1.0) -> None:
        """So much more is done."""
        self._done += work
        now = time.monotonic()
        if now - self._shown >= _EVERY and self._done < self._total:
            left = (now - self._started) * (self._total - self._done) / self._done
            self._say(f"{100 * self._done / self._total:.0f} %, {left:.0f} s left")
            self._shown = now


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
