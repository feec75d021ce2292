"""Trained weights on disk: entries of a zoo, found, verified and written, whatever the weights are of.

An entry is a folder of three files:

* ``weights.safetensors``: the weights, never pickled. Its metadata repeats the settings of what they belong to, so that
  weights and settings cannot drift apart unnoticed.
* ``config.json``: name, description, those settings, the sha256 of the weights, and how they were made.
* ``card.md``: for people. What it is good at and where it fails.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from learnedopt.runs import home_of

FORMAT_VERSION = 1
_TEXTS = ("name", "description", "sha256")
DEFINED_IN = "defined_in"
"""The key of ``config.json`` for the modules or files outside the package that define what its settings are of."""
_FILES = WEIGHTS, CONFIG, CARD = "weights.safetensors", "config.json", "card.md"
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
Settings = TypeVar("Settings")
Load = Callable[[Path], object]


class ZooError(ValueError):
    """An entry that cannot be found, read, trusted or written; the message says which and why."""


@dataclass(frozen=True)
class Entry:
    """What is known about every entry without reading its weights."""

    name: str
    description: str
    """One line: what it was trained for."""
    sha256: str
    """Of ``weights.safetensors``."""
    path: Path
    """The entry's folder."""

    @property
    def card(self) -> str:
        """The text of ``card.md``."""
        try:
            return _read(self.path / CARD).decode()
        except UnicodeDecodeError as error:
            raise ZooError(f"{self.path / CARD} is not UTF-8 text: {error}") from error


@dataclass(frozen=True)
class EntryKind(Generic[Settings]):
    """Entries that hold one kind of thing: where they are, what they say of it, and what they are called."""

    thing: str
    """What they hold, in messages and as the key of the weights' metadata."""
    called: tuple[str, str]
    """One of them and several, in messages."""
    settings: tuple[str, ...]
    """The keys of ``config.json`` that say what the weights belong to."""
    history: str
    """The key of ``config.json`` that says how they were made."""
    parse: Callable[[Any], Settings]
    """Settings from JSON: from the value of the key in ``settings``, or from a dictionary where there are several.
    Raises ``KeyError``, ``TypeError``, ``ValueError`` or ``RuntimeError`` for those that nothing can be built from."""
    folder: Callable[[], Path]
    """Where those that come with the package are."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of these."""

    def names(self) -> list[str]:
        """Of the entries that come with the package, in alphabetical order."""
        return sorted(path.parent.name for path in self.folder().glob(f"*/{CONFIG}"))

    def read(self, name_or_path: str | os.PathLike[str]) -> tuple[dict[str, Any], Settings, dict[str, Any]]:
        """The fields of an :class:`Entry`, the settings, and how the weights were made.

        Arguments and errors are those of :func:`learnedopt.zoo.entry_info`.
        """
        folder = self._find(name_or_path)
        values = self._config(folder / CONFIG)
        fields = {key: values[key] for key in _TEXTS} | {"path": folder}
        settings = self._parsed(self._described(values), folder / CONFIG, values.get(DEFINED_IN))
        return fields, settings, values[self.history]

    def tensors(self, entry: Entry, settings: Settings) -> dict[str, Tensor]:
        """The weights of an entry.

        Raises:
            ZooError: the file is missing, truncated, altered (its sha256 is not the one recorded), not written by this
                package, or of other settings.
        """
        file = entry.path / WEIGHTS
        data = _read(file)
        if (actual := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise ZooError(
                f"{file} is truncated or corrupted: its sha256 is {actual}, and {CONFIG} says {entry.sha256}. "
                f"Restore the file ({len(data)} bytes now) from its source"
            )
        try:
            tensors = safetensors.torch.load(data)
            # The header: an eight-byte length, then JSON.
            header = _json(data[8 : 8 + int.from_bytes(data[:8], "little")])
            described = dict(_json(header["__metadata__"][self.thing]))
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ZooError(f"{file} is not a weight file written by learnedopt ({error!r})") from error
        if (trained := self._parsed(described, file)) != settings:
            raise ZooError(
                f"{entry.path / CONFIG} does not match the weights beside it: they were trained as {trained}, and it "
                f"says {settings}"
            )
        return tensors

    def write(
        self, folder: Path, values: Mapping[str, Any], weights: Mapping[str, Tensor], card: str, load: Load
    ) -> None:
        """Write an entry, complete or not at all, replacing one that is there. The same arguments give the same bytes.

        Args:
            folder: Where. Parents are made.
            values: What ``config.json`` says, as JSON types: name, description, settings and history.
            weights: By name.
            card: Markdown for people.
            load: Called on the entry before it takes its place, to prove that it can be loaded.

        Raises:
            ZooError: the weights are not finite, name or description is not one line, something is not JSON, or the
                folder holds anything but an entry.
        """
        check_about(values["name"], values["description"])
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {*_FILES}):
            raise ZooError(f"{folder} exists and is not a zoo entry: choose another folder")
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
        if broken := _not_finite(tensors):
            dtype = str(tensors[broken[0]].dtype).removeprefix("torch.")
            raise ZooError(f"the {self.thing} cannot be saved: its weights are not finite in {dtype}, in {broken}")
        # A single metadata entry, because safetensors writes several in no fixed order.
        data = safetensors.torch.save(tensors, {self.thing: json.dumps(self._described(values), sort_keys=True)})
        values = {"format_version": FORMAT_VERSION, **values, "sha256": hashlib.sha256(data).hexdigest()}
        try:
            config = json.dumps(values, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ZooError(f"an entry's settings must be plain JSON types: {error}") from error
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            written, replaced = Path(scratch) / "new", Path(scratch) / "old"
            written.mkdir()
            (written / WEIGHTS).write_bytes(data)
            (written / CONFIG).write_text(config + "\n", encoding="utf-8")
            (written / CARD).write_text(card, encoding="utf-8")
            load(written)
            # A folder can be renamed only onto nothing: an old entry steps aside; its files go with the scratch folder.
            if folder.exists():
                os.replace(folder, replaced)
            try:
                os.replace(written, folder)
            except OSError:
                if replaced.exists():
                    os.replace(replaced, folder)
                raise

    def _find(self, name_or_path: str | os.PathLike[str]) -> Path:
        name, known, (one, several) = os.fspath(name_or_path), self.names(), self.called
        is_folder = not isinstance(name_or_path, str) or os.sep in name or "/" in name
        if not is_folder and (found := name if name in known else self.aliases.get(name)) in known:
            return self.folder() / found
        try:
            if Path(name).is_dir():
                return Path(name)
        except OSError as error:  # a name that no file can have
            raise ZooError(f"there is no entry or folder {name[:60]!r}...: {error.strerror}") from error
        if is_folder:
            raise ZooError(f"there is no folder {name!r}")
        close = difflib.get_close_matches(name, [*known, *self.aliases], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ZooError(
            f"the zoo has no {one} {name!r}, and there is no folder of that name.{hint} Its {several}: {known}"
        )

    def _config(self, file: Path) -> dict[str, Any]:
        """What ``config.json`` says, checked to have all keys with values of the right types."""
        text = _read(file)
        try:
            values = _json(text)
        except ValueError as error:
            raise ZooError(f"{file} is not valid JSON ({error})") from error
        if not isinstance(values, dict) or type(values.get("format_version")) is not int:
            advice = "; it is of a run: export that first" if (file.parent / "checkpoint.pt").exists() else ""
            raise ZooError(f"{file} does not describe a zoo entry: it has no integer 'format_version'{advice}")
        if values["format_version"] < 1:
            raise ZooError(f"{file} has format version {values['format_version']}, and the first one is 1: restore it")
        if values["format_version"] > FORMAT_VERSION:
            raise ZooError(
                f"{file} has format version {values['format_version']}, and this version of learnedopt reads up to "
                f"{FORMAT_VERSION}: upgrade learnedopt"
            )
        keys = ("name", "description", *self.settings, "sha256", self.history)
        if missing := [key for key in keys if key not in values]:
            raise ZooError(f"{file} lacks {missing}")
        for key in keys:
            if not isinstance(values[key], str if key in _TEXTS else dict):
                raise ZooError(f"{file}: {key!r} must be a JSON {'string' if key in _TEXTS else 'object'}")
        return values

    def _described(self, values: Mapping[str, Any]) -> Any:
        """What :attr:`parse` takes, and the weights' metadata repeat."""
        chosen = {key: values[key] for key in self.settings}
        return chosen if len(chosen) > 1 else chosen[self.settings[0]]

    def _parsed(self, described: Any, file: Path, defined_in: object = None) -> Settings:
        try:
            return self.parse(described)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            # Only said, never done: an entry is data, and runs no code.
            advice = ""
            if isinstance(defined_in, list) and defined_in:
                homes = " ".join(f"--import {home}" for home in defined_in)
                advice = f". It was defined in {', '.join(map(str, defined_in))}: import that first ({homes})"
            raise ZooError(f"{file} describes no {self.thing} that can be built: {why}{advice}") from error


def defined_in(*classes: type) -> dict[str, list[str]]:
    """What an entry says of where these are from: nothing, if all are of the package."""
    homes = sorted({home for each in classes if (home := home_of(each)) is not None})
    return {DEFINED_IN: homes} if homes else {}


def check_about(name: str, description: str) -> None:
    """Raise :class:`ZooError` unless an entry can have this name and this description."""
    if not name or any(separator in name for separator in "/\\\n"):
        raise ZooError(f"an entry's name is one word without path separators, got {name!r}")
    if len(name.encode()) > 200:
        raise ZooError(f"an entry's name is that of its folder, and this has {len(name.encode())} bytes: 200 at most")
    if not description.strip() or "\n" in description:
        raise ZooError(f"an entry's description is one line, got {description!r}")


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Raise :class:`ZooError` unless the tensors of ``file`` have the names and shapes expected, and are finite."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing tensors {missing}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected tensors {unexpected}")
    for key in sorted(expected.keys() & found.keys()):
        if expected[key].shape != found[key].shape:
            problems.append(f"{key!r} has shape {tuple(found[key].shape)}, not {tuple(expected[key].shape)}")
        allowed = _FLOATS if expected[key].dtype in _FLOATS else {expected[key].dtype}
        if found[key].dtype not in allowed:
            problems.append(f"{key!r} is {found[key].dtype}, not {expected[key].dtype}")
    if problems:
        raise ZooError(f"{file} does not match its configuration: {'; '.join(problems)}")
    if broken := _not_finite(found):
        raise ZooError(f"{file} holds values that are not finite, in {broken}")


def _json(text: bytes | str) -> Any:
    """What a JSON text says. Raises ``ValueError`` where it is none, is nested too deep, or has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
            raise ValueError(f"the key {twice!r} is there twice")
        return values

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(key for key, tensor in tensors.items() if not tensor.isfinite().all())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read {file}: {error.strerror}. An entry holds {WEIGHTS}, {CONFIG}, {CARD}") from error
