"""Trained rules on disk: list, load, verify and save them, in the files of :mod:`learnedopt.storage`.

Meta-parameters are stored in float32. The entries that come with the package need no download.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnedopt.rules import RuleConfig, UpdateRule, build_rule
from learnedopt.rules.legacy import former, modern_config, modern_weights
from learnedopt.storage import WEIGHTS, Entry, EntryKind, check_tensors, defined_in
from learnedopt.storage import ZooError as ZooError


@dataclass(frozen=True)
class ZooEntry(Entry):
    """What is known about a trained rule without reading its weights."""

    config: RuleConfig
    meta_training: Mapping[str, Any]
    """How the weights were made: recipe, tasks, horizon, steps, hardware, and so on."""


def list_entries() -> list[str]:
    """Names of the entries that come with the package, in alphabetical order."""
    return _RULES.names()


def entry_info(name_or_path: str | os.PathLike[str]) -> ZooEntry:
    """Describe an entry, of the zoo or of any folder.

    Args:
        name_or_path: A path object, or a string that contains a path separator, is a folder. Any other string is a
            name in the zoo if the zoo has it, or a role (:data:`ALIASES`), else a folder of the working directory. A
            folder therefore never hides an entry of the zoo; write ``./default`` to mean the folder.

    Raises:
        ZooError: there is no such entry, or its ``config.json`` is missing, is malformed, was written by a newer
            version, or describes no rule known here.
    """
    fields, config, history = _RULES.read(name_or_path)
    return ZooEntry(**fields, config=config, meta_training=history)


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
    tensors, rule = modern_weights(entry.config.kind, _RULES.tensors(entry, entry.config)), _blank(entry.config)
    check_tensors(rule.state_dict(), tensors, entry.path / WEIGHTS)
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
    tensors = {key: tensor.float() for key, tensor in rule.state_dict().items()}
    about = {"name": name, "description": description}
    values = {**about, "rule": rule.config.to_dict(), "meta_training": dict(meta_training), **defined_in(type(rule))}
    _RULES.write(Path(folder), values, tensors, card, load_rule)
    return entry_info(Path(folder))


def rule_fingerprint(rule: UpdateRule) -> str:
    """The sha256 of a rule's configuration and meta-parameters, wherever they are stored.

    Equal fingerprints mean the same rule bit for bit; device, training mode and file do not enter, dtype does.
    """
    return _fingerprint(rule.config.to_dict(), rule.state_dict())


def former_fingerprint(rule: UpdateRule) -> str | None:
    """What :func:`rule_fingerprint` was in version 0.1, where it was another."""
    before = former(rule.config.to_dict(), rule.state_dict())
    return None if before is None else _fingerprint(*before)


def _fingerprint(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, tensor in sorted(weights.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def root() -> Path:
    """The zoo's folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "zoo"
    return installed if installed.is_dir() else package.parent / "zoo"


def _blank(config: RuleConfig | Mapping[str, Any]) -> UpdateRule:
    """The rule of this configuration, its tensors on the meta device: names and shapes, no memory and no values."""
    with torch.device("meta"):
        return build_rule(config)


ALIASES = {"default": "sf-eigen-2", "light": "sf-adam-2"}
"""Roles, and the entries that have them now. What is saved names the entry."""

_RULES = EntryKind(
    "rule",
    ("entry", "entries"),
    ("rule",),
    history="meta_training",
    parse=lambda values: _blank(modern_config(values)).config,
    folder=lambda: root(),
    aliases=ALIASES,
)
