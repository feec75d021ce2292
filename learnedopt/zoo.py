"""Trained rules on disk: list, load, verify and save them.

An entry is a folder of three files:

* ``weights.safetensors``: the meta-parameters in float32, never pickled. Its metadata repeats the rule's
  configuration, so that weights and settings cannot drift apart unnoticed.
* ``config.json``: name, description, the rule's configuration, the sha256 of the weights, and how they were made.
* ``card.md``: for people. What the rule is good at and where it fails.

The entries that come with the package need no download.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from learnedopt.rules import RuleConfig, UpdateRule, build_rule

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD = "weights.safetensors", "config.json", "card.md"

_KEYS = {"name": str, "description": str, "rule": dict, "sha256": str, "meta_training": dict}


class ZooError(ValueError):
    """An entry that cannot be found, read, trusted or written; the message says which and why."""


@dataclass(frozen=True)
class ZooEntry:
    """What is known about a trained rule without reading its weights."""

    name: str
    description: str
    """One line: what it was trained for."""
    config: RuleConfig
    sha256: str
    """Of ``weights.safetensors``."""
    path: Path
    """The entry's folder."""
    meta_training: Mapping[str, Any]
    """How the weights were made: recipe, tasks, horizon, steps, hardware, and so on."""

    @property
    def card(self) -> str:
        """The text of ``card.md``."""
        return _read(self.path / CARD).decode()


def list_entries() -> list[str]:
    """Names of the entries that come with the package, in alphabetical order."""
    return sorted(path.parent.name for path in root().glob(f"*/{CONFIG}"))


def entry_info(name_or_path: str | os.PathLike[str]) -> ZooEntry:
    """Describe an entry, of the zoo or of any folder.

    Args:
        name_or_path: A path object, or a string that contains a path separator, is a folder. Any other string is a
            name in the zoo if the zoo has it, else a folder of the working directory. A folder therefore never hides
            an entry of the zoo; write ``./default`` to mean the folder.

    Raises:
        ZooError: there is no such entry, or its ``config.json`` is missing, is malformed, was written by a newer
            version, or describes no rule known here.
    """
    folder = _find(name_or_path)
    file = folder / CONFIG
    values = read_config(folder, _KEYS)
    return ZooEntry(
        name=values["name"],
        description=values["description"],
        config=_blank_rule(values["rule"], file).config,
        sha256=values["sha256"],
        path=folder,
        meta_training=values["meta_training"],
    )


def load_rule(name_or_path: str | os.PathLike[str]) -> UpdateRule:
    """Load a trained rule: verified, on the CPU, in float32, in evaluation mode and without gradients.

    Draws no random numbers, so that loading a rule changes nothing else in a seeded program.

    Args:
        name_or_path: A name in the zoo or a folder, as in :func:`entry_info`.

    Raises:
        ZooError: as :func:`entry_info`; or the weights are missing, truncated or altered (their sha256 is not the
            one recorded), do not fit the configuration, or are not finite.
    """
    entry = entry_info(name_or_path)
    file = entry.path / WEIGHTS
    tensors, embedded = read_weights(entry.path, entry.sha256, "rule")
    trained_config = _blank_rule(embedded, file).config
    if trained_config != entry.config:
        raise ZooError(
            f"{entry.path / CONFIG} does not match the weights beside it: they were trained as "
            f"{trained_config}, and it says {entry.config}"
        )
    rule = _blank_rule(entry.config, file)
    check_tensors(rule.state_dict(), tensors, file)
    # assign: the rule takes the loaded tensors themselves, whatever default dtype or device the program has set.
    rule.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    return rule.eval().requires_grad_(False)


def save_rule(
    rule: UpdateRule,
    folder: str | os.PathLike[str],
    *,
    name: str,
    description: str,
    card: str,
    meta_training: Mapping[str, Any],
) -> ZooEntry:
    """Write a rule as an entry that :func:`load_rule` reads.

    The folder appears complete or not at all: it is written beside its place, loaded once to prove that it can be,
    and renamed. An entry already there is replaced. Saving one rule twice gives the same bytes.

    Args:
        rule: The trained rule; its weights are stored in float32.
        folder: Where to write. Parents are made.
        name: The entry's name, which is the folder's name in the zoo.
        description: One line.
        card: Markdown for people: how it was made, what it is good at, where it fails.
        meta_training: How the weights were made, as JSON types.

    Raises:
        ZooError: the weights are not finite, ``name`` or ``description`` is not one line, ``meta_training`` is not
            JSON, the rule's kind is not registered, or the folder holds anything but an entry.

    >>> import tempfile
    >>> from learnedopt.rules import LSTMConfig, LSTMRule
    >>> rule = LSTMRule(LSTMConfig(hidden_size=4))
    >>> with tempfile.TemporaryDirectory() as runs:
    ...     entry = save_rule(
    ...         rule, f"{runs}/mine", name="mine", description="Untrained.", card="# mine", meta_training={"steps": 0}
    ...     )
    ...     rule_fingerprint(load_rule(entry.path)) == rule_fingerprint(rule)
    True
    """
    folder = Path(folder)
    check_writable(folder, name, description)
    tensors = {key: tensor.float().cpu().contiguous() for key, tensor in rule.state_dict().items()}
    if broken := _not_finite(tensors):
        raise ZooError(f"the rule cannot be saved: its weights are not finite in float32, in {broken}")
    # A single metadata entry, because safetensors writes several in no fixed order.
    weights = safetensors.torch.save(tensors, metadata={"rule": _config_json(rule.config)})
    config = {
        "name": name,
        "description": description,
        "rule": rule.config.to_dict(),
        "meta_training": dict(meta_training),
    }
    write_entry(folder, weights, config, card, load_rule)
    return entry_info(folder)


def read_config(folder: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """The ``config.json`` of an entry, checked to have these keys with values of these types.

    Raises:
        ZooError: it is missing, malformed, incomplete, or was written by a newer version.
    """
    file = folder / CONFIG
    text = _read(file)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ZooError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
        advice = "; it is of a run: export that first" if (folder / "checkpoint.pt").exists() else ""
        raise ZooError(f"{file} does not describe a zoo entry: it has no integer 'format_version'{advice}")
    if values["format_version"] > FORMAT_VERSION:
        raise ZooError(
            f"{file} has format version {values['format_version']}, and this version of learnedopt reads up to "
            f"{FORMAT_VERSION}: upgrade learnedopt"
        )
    if missing := [key for key in keys if key not in values]:
        raise ZooError(f"{file} lacks {missing}")
    for key, expected in keys.items():
        if not isinstance(values[key], expected):
            raise ZooError(f"{file}: {key!r} must be a JSON {'object' if expected is dict else 'string'}")
    return values


def read_weights(folder: Path, sha256: str, metadata: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of an entry, and the configuration that their file repeats under the key ``metadata``.

    Raises:
        ZooError: the file is missing, truncated, altered (its sha256 is another) or not written by this package.
    """
    file = folder / WEIGHTS
    data = _read(file)
    if (actual := hashlib.sha256(data).hexdigest()) != sha256:
        raise ZooError(
            f"{file} is truncated or corrupted: its sha256 is {actual}, and {CONFIG} says {sha256}. "
            f"Restore the file ({len(data)} bytes now) from its source"
        )
    try:
        return safetensors.torch.load(data), _embedded_config(data, metadata)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ZooError(f"{file} is not a weight file written by learnedopt ({error!r})") from error


def check_writable(folder: Path, name: str, description: str) -> None:
    """Raise :class:`ZooError` unless an entry of this name and description can be written to the folder."""
    if not name or any(separator in name for separator in "/\\\n"):
        raise ZooError(f"an entry's name is one word without path separators, got {name!r}")
    if not description.strip() or "\n" in description:
        raise ZooError(f"an entry's description is one line, got {description!r}")
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {WEIGHTS, CONFIG, CARD}):
        raise ZooError(f"{folder} exists and is not a zoo entry: choose another folder")


def write_entry(
    folder: Path, weights: bytes, config: Mapping[str, Any], card: str, load: Callable[[Path], object]
) -> None:
    """Write an entry's three files, complete or not at all, replacing one that is there.

    Args:
        folder: Where. Parents are made.
        weights: The content of ``weights.safetensors``; its sha256 is added to ``config``.
        config: What goes into ``config.json``, as JSON types.
        card: Markdown for people.
        load: Called on the entry before it takes its place, to prove that it can be loaded.

    Raises:
        ZooError: ``config`` is not JSON.
    """
    values = {"format_version": FORMAT_VERSION, **config, "sha256": hashlib.sha256(weights).hexdigest()}
    try:
        config_text = json.dumps(values, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ZooError(f"an entry's settings must be plain JSON types: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        written, replaced = Path(scratch) / "new", Path(scratch) / "old"
        written.mkdir()
        (written / WEIGHTS).write_bytes(weights)
        (written / CONFIG).write_text(config_text + "\n", encoding="utf-8")
        (written / CARD).write_text(card, encoding="utf-8")
        load(written)
        # A folder can be renamed only onto nothing, so an old entry steps aside; its files go with the scratch folder.
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(written, folder)


def rule_fingerprint(rule: UpdateRule) -> str:
    """The sha256 of a rule's configuration and meta-parameters, wherever they are stored.

    Equal fingerprints mean the same rule bit for bit; device, training mode and file do not enter, dtype does.
    """
    digest = hashlib.sha256(_config_json(rule.config).encode())
    for key, tensor in sorted(rule.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def root() -> Path:
    """The zoo's folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "zoo"
    return installed if installed.is_dir() else package.parent / "zoo"


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    name = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or os.sep in name or "/" in name:
        if Path(name).is_dir():
            return Path(name)
        raise ZooError(f"there is no folder {name!r}")
    known = list_entries()
    if name in known:
        return root() / name
    if Path(name).is_dir():
        return Path(name)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ZooError(f"the zoo has no entry {name!r}, and there is no folder of that name.{hint} Its entries: {known}")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read {file}: {error.strerror}. An entry holds {WEIGHTS}, {CONFIG}, {CARD}") from error


def _blank_rule(config: RuleConfig | Mapping[str, Any], file: Path) -> UpdateRule:
    """The rule of this configuration, its tensors on the meta device: names and shapes, no memory and no values."""
    try:
        with torch.device("meta"):
            return build_rule(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZooError(f"{file} describes no rule that can be built: {error}") from error


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
    if problems:
        raise ZooError(f"{file} does not match its configuration: {'; '.join(problems)}")
    if broken := _not_finite(found):
        raise ZooError(f"{file} holds values that are not finite, in {broken}")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(key for key, tensor in tensors.items() if not tensor.isfinite().all())


def _config_json(config: RuleConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def _embedded_config(weights: bytes, key: str) -> dict[str, Any]:
    """The configuration out of the weights' header: an eight-byte length, then JSON."""
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    return dict(json.loads(header["__metadata__"][key]))
