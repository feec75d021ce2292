"""The folder of a run: ``config.json``, ``log.jsonl``, ``checkpoint.pt``."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MARK = b"\nlearnedopt-sha256:"
"""After it comes the sha256 of what is before it, at the end of a checkpoint."""
Record = dict[str, Any]
Writer = tuple[Callable[[Record], Any], Callable[[], Any]]
"""How to write one record, and how to make sure that all so far are on disk."""


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: Where they are.
        activity: What the user is doing, for messages: ``"meta-training"``.
    """

    def __init__(self, path: str | os.PathLike[str], activity: str) -> None:
        self.path = Path(path)
        self.activity = activity
        self._checkpoint = self.path / "checkpoint.pt"
        self._config = self.path / "config.json"
        self._log = self.path / "log.jsonl"

    def claim(self, recipe: str) -> None:
        """Make the folder; refuse one in which a run would overwrite what no run of the recipe has written.

        Raises:
            ValueError: there is no checkpoint, but a ``config.json`` of something else, or a ``log.jsonl`` with none.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.exists() or not (self._config.exists() or self._log.exists()):
            return
        try:
            found = json.loads(self._config.read_text())
        except (FileNotFoundError, ValueError):
            found = None
        # A run that was killed before its first checkpoint has left both.
        if not (isinstance(found, dict) and found.get("recipe") == recipe):
            name = self._config.name if self._config.exists() else self._log.name
            raise ValueError(
                f"{self.path} has a {name} that is not of a run of {recipe}: choose another folder for the run"
            )

    def write_config(self, content: dict[str, Any]) -> None:
        """Write as JSON, complete or not at all: a run that is killed meanwhile must know its folder again."""
        self._replace(self._config, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def write_checkpoint(self, content: dict[str, Any]) -> None:
        """Write with ``torch.save``, and its sha256 after that; the old checkpoint stays until the new one is whole.

        Raises:
            OSError: it cannot be written, as where the disk is full. The old checkpoint is as it was.
        """
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
        self._replace(self._checkpoint, data + _MARK + hashlib.sha256(data).hexdigest().encode())

    def read_checkpoint(self) -> dict[str, Any] | None:
        """What :meth:`write_checkpoint` wrote, on the CPU; ``None`` if there is none.

        Few-shot training once wrote the trainer's state at the top.

        Raises:
            ValueError: it is damaged, or no checkpoint of a run.
        """
        if not self._checkpoint.exists():
            return None
        data, mark, digest = self._checkpoint.read_bytes().rpartition(_MARK)
        if not mark:  # of version 0.1, which wrote none
            data, digest = digest, b""
        try:
            if mark and hashlib.sha256(data).hexdigest().encode() != digest:
                raise ValueError("its sha256 is another")
            saved: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return {"trainer": saved, "commit": saved["commit"]} | saved
        except Exception as error:  # which one depends on where the damage is
            raise ValueError(
                f"{self._checkpoint} is damaged or no checkpoint of a {self.activity} run ({type(error).__name__}); "
                "remove it to start anew, or restore it"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For as long as something writes here. It is released with the process, however that ends.

        Raises:
            ValueError: another process writes here.
        """
        if fcntl is None:
            yield
            return
        lock = os.open(self.path, os.O_RDONLY)  # the folder itself
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is at work in {self.path}: wait for it, stop it, or choose another folder"
                ) from error
            yield
        finally:
            os.close(lock)

    def _replace(self, path: Path, data: bytes) -> None:
        """Complete or not at all; nothing is left behind where it cannot be written."""
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"{path} cannot be written ({error.strerror}); what was there before is as it was"
            ) from error

    def writers(self, stack: ExitStack, unit: str, done: int, tensorboard: bool, parts: int = 0) -> list[Writer]:
        """Where records go, closed by the stack: the log, and TensorBoard if asked.

        Of the log the first ``done`` records stay, with the parts of each, and the first ``parts`` of the next.
        """
        first = done + 1
        if self._log.exists():
            # Lines beyond the checkpoint, the last maybe unfinished, are written again.
            with self._log.open("rb+") as file:
                kept = file.tell()
                while (done or parts) and (line := file.readline()):
                    is_part = b'"part": ' in line
                    if is_part and not done:
                        parts -= 1
                    done -= not is_part
                    kept = file.tell()
                file.truncate(kept)
        log = stack.enter_context(self._log.open("a"))
        writers: list[Writer] = [(lambda record: log.write(json.dumps(record) + "\n"), log.flush)]
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("the TensorBoard log needs tensorboard: pip install tensorboard") from error
            board: Any = SummaryWriter(self.path, purge_step=first)
            stack.callback(board.close)
            writers.append((lambda record: _scalars(board, record, unit), board.flush))
        return writers


def _scalars(board: Any, record: Record, unit: str) -> None:
    for name, value in record.items():
        if name != unit and isinstance(value, int | float):
            board.add_scalar(name, value, record[unit])
