"""A recipe being run in a folder: it can be interrupted at any moment, and trusted."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from learnedopt.runs.folder import Record, RunFolder, Writer
from learnedopt.runs.provenance import hardware, source_commit

Stop = Callable[[], bool]
_SAVE_AFTER = 60.0
"""Seconds of work within one record after which a checkpoint is written."""


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
    _began: float = 0.0
    """When training would have begun in a single sitting."""
    best_score: float
    """That of the best validation so far."""

    @property
    def parts(self) -> int:
        """How many parts of the next record the log has."""
        return 0

    @cached_property
    def listeners(self) -> list[Callable[[Record], None]]:
        """Called with what :meth:`tell` is given."""
        return []

    def tell(self, record: Record) -> None:
        """Say what was done within a record that takes long: its ``part``, from 0 to 1, and whatever else is known.

        With a ``gain`` it is the end of a part, which the log has. ``seconds`` is the same in all processes.
        """
        for listener in self.listeners:
            listener(record)

    @property
    def elapsed(self) -> float:
        """Seconds of training up to now, over all sittings."""
        return time.perf_counter() - self._began

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
        """Train on, a record at a time, until all is done or ``stop`` says so, asked once for each.

        Where one takes longer than seconds it is asked within it too, and :meth:`state_dict` has what was done.
        """

    def run(self, time_limit: float = math.inf, stop: Stop = lambda: False) -> Iterator[Record]:
        """Train on from where this stands, yielding :meth:`records` with ``seconds``, those of all sittings.

        Args:
            time_limit: Stop cleanly after this many seconds.
            stop: Asked once for each record, or more often; stop cleanly where it says so.
        """
        started = time.perf_counter()
        self._began = started - self.seconds
        for record in self.records(lambda: stop() or time.perf_counter() - started > time_limit):
            self.seconds = self.elapsed
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


T = TypeVar("T", bound=Trainable)
E_co = TypeVar("E_co", covariant=True)


class Runnable(Protocol[T, E_co]):
    """What a :class:`Run` asks of a recipe."""

    activity: ClassVar[str]
    """What its user is doing, for messages: ``"meta-training"``."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def start(self) -> str:
        """What training begins with, as a name or a folder; "" for random weights."""

    @property
    def checkpoint_every(self) -> int:
        """Records between checkpoints."""

    def trainer(self, root: Path | None, device: torch.device | str, state: dict[str, Any] | None = None) -> T:
        """What trains by the recipe, from the beginning or from its state."""

    def export(self, trainer: T, folder: Path, card: str, made: dict[str, Any]) -> E_co:
        """Write the best so far as an entry of the zoo; ``made`` says where and when it was made."""


class Run(Generic[T, E_co]):
    """A recipe being run in a folder: ``config.json``, ``log.jsonl``, ``checkpoint.pt``.

    A folder that holds a checkpoint is continued from it; the outcome is bit for bit that of a run without
    interruption (on the same machine and number of threads).

    Where processes train together, each makes this object and calls its methods alike; the first writes the files.

    Args:
        recipe: What to run.
        folder: Where; created if need be.
        root: Folder of downloaded data, passed to the recipe.
        device: Where to train. A run may move: a checkpoint made on one device continues on another.
        tensorboard: Write the numbers of the log for TensorBoard too.

    Raises:
        ValueError: the folder's checkpoint is of another recipe, was made with other settings, or cannot be read; or
            the folder holds something else under the names of a run's files; or what training is to begin with does
            not fit.
        ZooError: what training is to begin with cannot be loaded.

    >>> import tempfile
    >>> from learnedopt.meta import MetaTrainConfig, Recipe
    >>> from learnedopt.rules import LSTMConfig
    >>> from learnedopt.tasks import Quadratics
    >>> training = MetaTrainConfig(updates=2, unroll_length=5, horizon=(10, 10), validate_every=2)
    >>> recipe = Recipe("mine", "Mine.", "bowls", LSTMConfig(hidden_size=4), training, lambda root: Quadratics())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = [record["update"] for record in Run(recipe, folder).run(time_limit=0.0)]
    ...     first, [record["update"] for record in Run(recipe, folder).run()]
    ([1], [2])
    """

    def __init__(
        self,
        recipe: Runnable[T, E_co],
        folder: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        tensorboard: bool = False,
    ) -> None:
        self.recipe = recipe
        self.tensorboard = tensorboard
        self.device = torch.device(device)
        self._files = RunFolder(folder, recipe.activity)
        saved = self._files.read_checkpoint()
        data = None if root is None else Path(root)
        # Nothing else tells apart two recipes that differ in their tasks alone.
        if saved is not None and (name := saved.get("recipe", recipe.name)) != recipe.name:
            raise ValueError(f"{folder} holds a run of the recipe {name!r}, not {recipe.name!r}")
        try:
            self.trainer = recipe.trainer(data, device, None if saved is None else saved["trainer"])
        except OtherRunError as error:
            raise ValueError(f"{folder} holds another run: {error}") from error
        if saved is not None and saved.get("start", "") != self.trainer.origin:
            raise ValueError(f"{folder} holds a run that began with other weights than those of the recipe now")
        self.commit = source_commit() if saved is None else saved["commit"]
        self._files.claim(recipe.name)
        if self.trainer.writes:
            config = {"recipe": recipe.name, "commit": self.commit, "start": recipe.start, "device": str(device)}
            self._files.write_config(config | self.trainer.settings())

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self._files.path

    def run(self, time_limit: float = math.inf, stop: Stop = lambda: False) -> Generator[Record]:
        """Train on, yielding :meth:`Trainable.run`'s records, each also a line of ``log.jsonl``.

        A checkpoint is written every ``checkpoint_every`` records and at the end, also when the caller stops early
        (closes the generator). An exception in the middle of an update leaves the last checkpoint as it is: half an
        update cannot be continued exactly. Log lines past the checkpoint are dropped on resuming.

        Where a record takes long, its parts are lines of the log too, told by their key ``part``, and a checkpoint is
        written every minute.

        Raises:
            ValueError: another process is at work in the folder.
            OSError: a file cannot be written, as where the disk is full.
        """
        trainer = self.trainer
        with ExitStack() as stack:
            writers: list[Writer] = []
            if trainer.writes:
                stack.enter_context(self._files.locked())
                writers = self._files.writers(stack, trainer.unit, trainer.done, self.tensorboard, trainer.parts)
            saved = trainer.seconds

            def part(record: Record) -> None:
                nonlocal saved
                if "gain" in record and writers:
                    (write, flush), *_ = writers
                    write(record)
                    flush()
                if record["seconds"] - saved > _SAVE_AFTER:
                    self._save(writers)
                    saved = record["seconds"]

            trainer.listeners.append(part)
            stack.callback(trainer.listeners.remove, part)
            try:
                for record in trainer.run(time_limit, stop):
                    for write, _ in writers:
                        write(record)
                    if trainer.done % self.recipe.checkpoint_every == 0:
                        self._save(writers)
                    yield record
            except GeneratorExit:
                self._save(writers)
                raise
            self._save(writers)

    def save(self) -> None:
        """Write the checkpoint; the old one stays in place until the new one is whole."""
        names = {"recipe": self.recipe.name, "commit": self.commit, "start": self.trainer.origin}
        content = names | {"trainer": self.trainer.state_dict()}
        if self.trainer.writes:
            self._files.write_checkpoint(content)

    def export(self, zoo_folder: str | os.PathLike[str]) -> E_co:
        """Write the best so far as a zoo entry; an existing card is kept.

        Args:
            zoo_folder: The folder of all entries; the entry is the recipe's name in it.

        Raises:
            ValueError: no validation has had a finite score yet, so that there is no best.
        """
        recipe = self.recipe
        folder = Path(zoo_folder) / recipe.name
        card = folder / "card.md"
        text = card.read_text() if card.exists() else f"# {recipe.name}\n\n{recipe.description}\n"
        made = {
            "commit": self.commit,
            "seconds": round(self.trainer.seconds),
            "hardware": hardware(self.device),
            "torch": str(torch.__version__),
        }
        return recipe.export(self.trainer, folder, text, made)

    def _save(self, writers: list[Writer]) -> None:
        """Checkpoints follow the log, so that it has a line for every update that they know of."""
        for _, flush in writers:
            flush()
        self.save()
