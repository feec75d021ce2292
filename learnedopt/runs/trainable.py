"""What can be trained, and the clock of its loop."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from learnedopt.runs.folder import Record

Stop = Callable[[], bool]


class OtherRunError(ValueError):
    """A state cannot be taken over: it is of other settings, or of other tasks. The message says of which."""


class Trainable(ABC):
    """What a :class:`Run` drives."""

    unit: ClassVar[str]
    """What is counted, the key of its number in a record: ``"update"``."""
    loss: ClassVar[str]
    """The key of the loss in a record."""
    origin: str = ""
    """Tells apart the weights that training began with; "" for those drawn from a seed."""
    seconds: float = 0.0
    """Of training so far, over all sittings."""
    best_score: float
    """That of the best validation so far."""

    @property
    @abstractmethod
    def done(self) -> int:
        """How many records there have been, over all sittings."""

    @property
    @abstractmethod
    def total(self) -> int:
        """How many there are to be."""

    @property
    def finished(self) -> bool:
        """Whether there is no more to do."""
        return self.done >= self.total

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return True

    @abstractmethod
    def records(self, stop: Stop) -> Iterator[Record]:
        """Train on, a record at a time, until all is done or ``stop``, asked once for each, says so."""

    def run(self, time_limit: float = math.inf, stop: Stop = lambda: False) -> Iterator[Record]:
        """Train on from where this stands, yielding :meth:`records` with ``seconds``, those of all sittings.

        Args:
            time_limit: Stop cleanly after this many seconds.
            stop: Asked once for each record; stop cleanly where it says so.
        """
        started, before = time.perf_counter(), self.seconds
        for record in self.records(lambda: stop() or time.perf_counter() - started > time_limit):
            self.seconds = before + time.perf_counter() - started
            yield record | {"seconds": self.seconds}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What ``config.json`` says of it, as JSON types."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from :meth:`state_dict`. Raises :class:`OtherRunError` if that is of something else."""
