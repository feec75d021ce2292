"""Trained learners on disk: entries of the zoo, in ``zoo/fewshot``, in the files of :mod:`learnedopt.zoo`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from learnedopt import zoo
from learnedopt.fewshot.backbones import BACKBONES, BackboneConfig
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape
from learnedopt.fewshot.learners import LEARNERS
from learnedopt.zoo import ZooError

_KEYS = {
    "name": str,
    "description": str,
    "learner": dict,
    "backbone": dict,
    "shape": dict,
    "training": dict,
    "sha256": str,
}


@dataclass(frozen=True)
class LearnerEntry:
    """What is known about a trained learner without reading its weights."""

    name: str
    description: str
    """One line."""
    learner: LearnerConfig
    backbone: BackboneConfig
    shape: LearnerShape
    training: Mapping[str, Any]
    """How the weights were made: data, episodes, settings, steps, hardware, and so on."""
    sha256: str
    """Of ``weights.safetensors``."""
    path: Path
    """The entry's folder."""

    @property
    def card(self) -> str:
        """The text of ``card.md``."""
        return (self.path / zoo.CARD).read_text(encoding="utf-8")


def list_learners() -> list[str]:
    """Names of the trained learners that come with the package, in alphabetical order."""
    return sorted(path.parent.name for path in _root().glob(f"*/{zoo.CONFIG}"))


def learner_info(name_or_path: str | os.PathLike[str]) -> LearnerEntry:
    """Describe a trained learner, of the zoo (by name) or of any folder (by path).

    Raises:
        ZooError: there is no such entry, or its ``config.json`` is missing, is malformed, or describes no learner known
            here.
    """
    folder = _find(name_or_path)
    values = zoo.read_config(folder, _KEYS)
    learner, backbone, shape = _settings(values, folder / zoo.CONFIG)
    return LearnerEntry(
        values["name"],
        values["description"],
        learner,
        backbone,
        shape,
        values["training"],
        values["sha256"],
        folder,
    )


def load_learner(name_or_path: str | os.PathLike[str]) -> Learner:
    """Load a trained learner: verified, on the CPU, in float32, in evaluation mode.

    Args:
        name_or_path: A name that :func:`list_learners` gives, or a folder.

    Raises:
        ZooError: as :func:`learner_info`; or the weights are missing, truncated or altered (their sha256 is not the one
            recorded), do not fit the configuration, or are not finite.
    """
    entry = learner_info(name_or_path)
    file = entry.path / zoo.WEIGHTS
    tensors, embedded = zoo.read_weights(entry.path, entry.sha256, "learner")
    if _settings(embedded, file) != (entry.learner, entry.backbone, entry.shape):
        raise ZooError(
            f"{entry.path / zoo.CONFIG} does not match the weights beside it: they were trained as {embedded}"
        )
    learner = entry.learner.build(entry.backbone, entry.shape, torch.Generator().manual_seed(0))
    zoo.check_tensors(learner.state_dict(), tensors, file)
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
    folder = Path(folder)
    zoo.check_writable(folder, name, description)
    check_known(learner.config, backbone)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in learner.state_dict().items()}
    if broken := sorted(key for key, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ZooError(f"the learner cannot be saved: its weights are not finite, in {broken}")
    settings = {
        "learner": learner.config.to_dict(),
        "backbone": backbone.to_dict(),
        "shape": dataclasses.asdict(learner.shape),
    }
    weights = safetensors.torch.save(tensors, metadata={"learner": json.dumps(settings, sort_keys=True)})
    config = {"name": name, "description": description, **settings, "training": dict(training)}
    zoo.write_entry(folder, weights, config, card, load_learner)
    return learner_info(folder)


def check_known(learner: LearnerConfig, backbone: BackboneConfig) -> None:
    """Raise ``ZooError`` unless method and backbone can be found again by the names that an entry has for them."""
    for config, known, name in ((learner, LEARNERS, "LEARNERS"), (backbone, BACKBONES, "BACKBONES")):
        if known.get(config.kind) is not type(config):
            raise ZooError(
                f"an entry could not be loaded again: {type(config).__name__} is not in learnedopt.fewshot.{name}. Put "
                f"it there where it is defined: {name}[{config.kind!r}] = {type(config).__name__}"
            )


def _settings(values: Mapping[str, Any], file: Path) -> tuple[LearnerConfig, BackboneConfig, LearnerShape]:
    """Configurations from their JSON form."""
    try:
        learner = LEARNERS[values["learner"]["kind"]].from_dict(values["learner"])
        backbone = BACKBONES[values["backbone"]["kind"]].from_dict(values["backbone"])
        shape = {**values["shape"], "example_shape": tuple(values["shape"]["example_shape"])}
        return learner, backbone, LearnerShape(**shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ZooError(f"{file} describes no learner that can be built: {error!r}") from error


def _root() -> Path:
    return zoo.root() / "fewshot"


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in list_learners():
        return _root() / name
    if Path(name).is_dir():
        return Path(name)
    raise ZooError(f"the zoo has no learner {name!r}, and there is no folder of that name; learners: {list_learners()}")
