"""Trained learners on disk: entries of the zoo, in ``zoo/fewshot``, in the files of :mod:`learnedopt.storage`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learnedopt import zoo
from learnedopt.fewshot.backbones import BACKBONES, BackboneConfig
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape
from learnedopt.fewshot.learners import LEARNERS
from learnedopt.storage import WEIGHTS, Entry, EntryKind, ZooError, check_tensors


@dataclass(frozen=True)
class LearnerEntry(Entry):
    """What is known about a trained learner without reading its weights."""

    learner: LearnerConfig
    backbone: BackboneConfig
    shape: LearnerShape
    training: Mapping[str, Any]
    """How the weights were made: data, episodes, settings, steps, hardware, and so on."""


def list_learners() -> list[str]:
    """Names of the trained learners that come with the package, in alphabetical order."""
    return _LEARNERS.names()


def learner_info(name_or_path: str | os.PathLike[str]) -> LearnerEntry:
    """Describe a trained learner, of the zoo (by name) or of any folder (by path).

    Raises:
        ZooError: there is no such entry, or its ``config.json`` is missing, is malformed, or describes no learner known
            here.
    """
    fields, (learner, backbone, shape), history = _LEARNERS.read(name_or_path)
    return LearnerEntry(**fields, learner=learner, backbone=backbone, shape=shape, training=history)


def load_learner(name_or_path: str | os.PathLike[str]) -> Learner:
    """Load a trained learner: verified, on the CPU, in float32, in evaluation mode.

    Args:
        name_or_path: A name that :func:`list_learners` gives, or a folder.

    Raises:
        ZooError: as :func:`learner_info`; or the weights are missing, truncated or altered (their sha256 is not the one
            recorded), do not fit the configuration, or are not finite.
    """
    entry = learner_info(name_or_path)
    tensors = _LEARNERS.tensors(entry, (entry.learner, entry.backbone, entry.shape))
    learner = entry.learner.build(entry.backbone, entry.shape, torch.Generator().manual_seed(0))
    check_tensors(learner.state_dict(), tensors, entry.path / WEIGHTS)
    learner.load_state_dict(tensors)
    return learner.eval()


def save_learner(
    learner: Learner,
    folder: str | os.PathLike[str],
    *,
    name: str,
    description: str,
    backbone: BackboneConfig,
    card: str,
    training: Mapping[str, Any],
) -> LearnerEntry:
    """Write a learner as an entry that :func:`load_learner` reads; complete or not at all.

    Args:
        learner: The trained learner.
        folder: Where to write. Parents are made; an entry already there is replaced.
        name: The entry's name.
        description: One line.
        backbone: The settings that its backbone was built from.
        card: Markdown for people.
        training: How the weights were made, as JSON types.

    Raises:
        ZooError: the weights are not finite, ``name`` or ``description`` is not one line, ``training`` is not JSON,
            method or backbone are in no registry, or the folder holds anything but an entry.
    """
    check_known(learner.config, backbone)
    values = {
        "name": name,
        "description": description,
        "learner": learner.config.to_dict(),
        "backbone": backbone.to_dict(),
        "shape": dataclasses.asdict(learner.shape),
        "training": dict(training),
    }
    _LEARNERS.write(Path(folder), values, learner.state_dict(), card, load_learner)
    return learner_info(Path(folder))


def check_known(learner: LearnerConfig, backbone: BackboneConfig) -> None:
    """Raise ``ZooError`` unless method and backbone can be found again by the names that an entry has for them."""
    for config, known, name in ((learner, LEARNERS, "LEARNERS"), (backbone, BACKBONES, "BACKBONES")):
        if known.get(config.kind) is not type(config):
            raise ZooError(
                f"an entry could not be loaded again: {type(config).__name__} is not in learnedopt.fewshot.{name}. Put "
                f"it there where it is defined: {name}[{config.kind!r}] = {type(config).__name__}"
            )


def _parse(values: Mapping[str, Any]) -> tuple[LearnerConfig, BackboneConfig, LearnerShape]:
    learner = LEARNERS[values["learner"]["kind"]].from_dict(values["learner"])
    backbone = BACKBONES[values["backbone"]["kind"]].from_dict(values["backbone"])
    return learner, backbone, LearnerShape(**values["shape"])


_LEARNERS = EntryKind(
    "learner",
    ("learner", "learners"),
    ("learner", "backbone", "shape"),
    "training",
    _parse,
    lambda: zoo.root() / "fewshot",
)
