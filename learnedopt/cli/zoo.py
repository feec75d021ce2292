"""``learnedopt zoo``: rules and few-shot learners that come with the package."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from learnedopt import fewshot, zoo
from learnedopt.cli.fewshot import fewshot_train
from learnedopt.cli.meta_train import meta_train, training_options
from learnedopt.cli.shared import add_command
from learnedopt.rules import UpdateRule
from learnedopt.storage import WEIGHTS


def add(entries: argparse.ArgumentParser, help: str) -> None:
    """``zoo list``, ``show`` and ``train``."""
    entry_commands = entries.add_subparsers(required=True, metavar="COMMAND")
    add_command(entry_commands, "list", _list, "their names, those of learners last")
    show = add_command(entry_commands, "show", _show, "how one was made, what it is good at and where it fails")
    show.add_argument("name", metavar="NAME", help="a name in the zoo, or an entry's folder")
    again = add_command(
        entry_commands, "train", zoo_train, "train an entry of the zoo again, by the recipe that made it"
    )
    again.add_argument("recipe", metavar="NAME", help="a name in the zoo")
    again.add_argument("--resume", action="store_true", help="go on with the run in --out, from where it stopped")
    training_options(again)


def _list(arguments: argparse.Namespace) -> int:
    rules = [zoo.entry_info(name) for name in zoo.list_entries()]
    learners = [fewshot.learner_info(name) for name in fewshot.list_learners()]
    for entries in (rules, learners):
        width = max((len(entry.name) for entry in entries), default=0)
        for entry in entries:
            print(f"{entry.name:<{width}}  {entry.description}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.name in fewshot.list_learners() or _is_learner(arguments.name):
        return _show_learner(arguments.name)
    entry, rule = zoo.entry_info(arguments.name), zoo.load_rule(arguments.name)
    facts: dict[str, object] = {
        "folder": entry.path,
        "sha256": f"{zoo.rule_fingerprint(rule)} of the rule, which states and messages name",
        "": f"{entry.sha256} of the file {WEIGHTS}",
        "rule": _settings(entry.config.to_dict()),
        "meta-parameters": sum(weight.numel() for weight in rule.parameters()),
        "state": _state(rule),
        "meta-training": _settings(entry.meta_training),
    }
    _print(facts, entry.card)
    return 0


def _is_learner(folder: str) -> bool:
    try:
        fewshot.learner_info(folder)
    except zoo.ZooError:
        return False
    return True


def _show_learner(name: str) -> int:
    entry, learner = fewshot.learner_info(name), fewshot.load_learner(name)
    facts: dict[str, object] = {
        "folder": entry.path,
        "sha256": f"{entry.sha256} of the file {WEIGHTS}",
        "learner": _settings(entry.learner.to_dict()),
        "backbone": _settings(entry.backbone.to_dict()),
        "weights": sum(weight.numel() for weight in learner.parameters()),
        "training": _settings(entry.training),
    }
    _print(facts, entry.card)
    return 0


def _print(facts: Mapping[str, object], card: str) -> None:
    for name, value in facts.items():
        print(f"{name + ':' if name else '':<17}{value}")
    print(f"\n{card.rstrip()}")


def _settings(values: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _state(rule: UpdateRule) -> str:
    said, side = f"{rule.state_bytes_per_parameter()} bytes per parameter in float32", 128
    if rule.coordinates is None:
        return said
    own = rule.coordinates.initial((side, side), None, torch.device("meta"))
    numbers = sum(value.numel() for value in own.values())
    return f"{said}, and {4 * numbers // side**2} more in matrices that are square"


def zoo_train(arguments: argparse.Namespace) -> int:
    is_learner = arguments.recipe in fewshot.list_learners()
    if not is_learner:
        zoo.entry_info(arguments.recipe)
    folder = arguments.out or Path("runs") / arguments.recipe
    there = (folder / "checkpoint.pt").exists()
    if there and not arguments.resume and not arguments.settings:
        raise ValueError(f"{folder} holds a run already: go on with it by --resume, or give another --out")
    if arguments.resume and not there:
        raise ValueError(f"there is no run to resume in {folder}: leave out --resume, or say where by --out")
    if not is_learner:
        return meta_train(arguments)
    if arguments.more or arguments.settings or arguments.tensorboard:
        raise ValueError(
            f"{arguments.recipe} is a few-shot learner, and settings of its recipe cannot be replaced here: "
            "`learnedopt fewshot train` has options for seed and steps, and takes recipes of your own"
        )
    return fewshot_train(argparse.Namespace(**vars(arguments) | {"out": folder, "seed": None, "steps": None}))
