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
from learnedopt.fewshot.config import Config
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape
from learnedopt.fewshot.learners import LEARNERS
from learnedopt.fewshot.normalization import Normalization
from learnedopt.storage import WEIGHTS, Entry, EntryKind, ZooError, check_tensors, defined_in


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


def load_learner(name_or_path: str | os.PathLike[str], normalization: Normalization | None = None) -> Learner:
    """Load a trained learner: verified, on the CPU, in float32, in evaluation mode.

    It predicts every query by itself, one image as well as many: batch normalization that was trained with the
    statistics of all queries (*transductive*) has those of the support set, unless you ask for the former.

    Args:
        name_or_path: A name that :func:`list_learners` gives, or a folder.
        normalization: Whose statistics batch normalization uses, see :mod:`learnedopt.fewshot.normalization`; by
            default ``"support"`` where the entry says ``"transductive"``, else what it says.

    Raises:
        ValueError: the normalization is none of the three, or ``"running"``, and the learner has no running averages.
        ZooError: as :func:`learner_info`; or the weights are missing, truncated or altered (their sha256 is not the one
            recorded), do not fit the configuration, or are not finite.
    """
    entry = learner_info(name_or_path)
    tensors = _LEARNERS.tensors(entry, (entry.learner, entry.backbone, entry.shape))
    try:
        with torch.device("meta"):
            shapes = entry.learner.build(entry.backbone, entry.shape).state_dict()
    except (RuntimeError, NotImplementedError):  # a backbone of one's own may need values to be built
        shapes = None
    if shapes is not None:  # before memory is taken for what the weights do not fit
        check_tensors(shapes, tensors, entry.path / WEIGHTS)
    learner = entry.learner.build(entry.backbone, entry.shape, torch.Generator().manual_seed(0))
    check_tensors(learner.state_dict(), tensors, entry.path / WEIGHTS)
    learner.load_state_dict(tensors)
    own = learner.config.normalization
    chosen = normalization or ("support" if own == "transductive" else own)
    return learner.with_config(normalization=chosen).eval()


def save_learner(
    learner: Learner,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    description: str | None = None,
    backbone: BackboneConfig | None = None,
    card: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> LearnerEntry:
    """Write a learner as an entry that :func:`load_learner` reads; complete or not at all.

    Args:
        learner: The trained learner.
        folder: Where to write. Parents are made; an entry already there is replaced.
        name: The entry's name; by default the folder's.
        description: One line; by default the method and what it was made for.
        backbone: The settings that its backbone can be built from; by default those it was built from.
        card: Markdown for people; by default name and description.
        training: How the weights were made, as JSON types; by default nothing.

    Raises:
        ZooError: the weights are not finite, ``name`` or ``description`` is not one line, ``training`` is not JSON,
            method or backbone are in no registry, the learner was built around a module and ``backbone`` does not say
            how to build it again, or the folder holds anything but an entry.

    >>> import tempfile
    >>> from learnedopt.fewshot import MLP, LEARNERS
    >>> learner = LEARNERS["maml"]().build(MLP(), LearnerShape((3,), ways=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     entry = save_learner(learner, f"{folder}/mine")
    >>> entry.name, entry.description, entry.backbone
    ('mine', 'maml, 2-way, of examples (3,)', MLP(hidden=(40, 40), batch_norm=False))
    """
    backbone = backbone or learner.backbone
    if backbone is None:
        raise ZooError(
            "this learner was built around a module, and an entry says how to build it again: give backbone=, a "
            "BackboneConfig whose build() makes such a module (docs/fewshot.md, Backbones of your own)"
        )
    check_known(learner.config, backbone)
    name = Path(folder).resolve().name if name is None else name
    if description is None:
        problem = "regression" if learner.shape.ways is None else f"{learner.shape.ways}-way"
        description = f"{learner.config.kind}, {problem}, of examples {learner.shape.example_shape}"
    values = {
        "name": name,
        "description": description,
        "learner": learner.config.to_dict(),
        "backbone": backbone.to_dict(),
        "shape": dataclasses.asdict(learner.shape),
        "training": dict(training or {}),
        **defined_in(type(learner), type(learner.config), type(backbone)),
    }
    card = f"# {name}\n\n{description}\n" if card is None else card
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
    learner: LearnerConfig = _known(LEARNERS, "LEARNERS", values["learner"])
    backbone: BackboneConfig = _known(BACKBONES, "BACKBONES", values["backbone"])
    return learner, backbone, LearnerShape(**values["shape"])


def _known(registry: Mapping[str, type[Config]], name: str, values: Mapping[str, Any]) -> Any:
    if values["kind"] not in registry:
        raise ValueError(
            f"{values['kind']!r} is not in learnedopt.fewshot.{name}, which has {', '.join(registry)}: import the "
            "module that puts it there first"
        )
    return registry[values["kind"]].from_dict(values)


_LEARNERS = EntryKind(
    "learner",
    ("learner", "learners"),
    ("learner", "backbone", "shape"),
    "training",
    _parse,
    lambda: zoo.root() / "fewshot",
)
