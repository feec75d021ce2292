"""Recipes: the frozen configuration that makes a zoo entry."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from learnedopt import zoo
from learnedopt.meta.config import MetaTrainConfig, SearchConfig
from learnedopt.meta.search import Search
from learnedopt.meta.trainer import MetaTrainer
from learnedopt.rules import RuleConfig, UpdateRule
from learnedopt.runs import load_file
from learnedopt.tasks.base import TaskFamily

_CHOICE = re.compile(r"(rule|training)(\.[\w-]+)*:[\w-]+")
"""On the command line, which of several classes is to stand somewhere."""


@dataclass(frozen=True)
class Recipe:
    """How one zoo entry is made."""

    name: str
    """The entry's name."""
    description: str
    """One line: what the entry is."""
    tasks: str
    """One line: what it is trained on."""
    rule: RuleConfig
    training: MetaTrainConfig | SearchConfig
    """By gradients or their estimates (:class:`MetaTrainer`), or by search over a few weights (:class:`Search`)."""
    family: Callable[[Path | None], TaskFamily]
    """The tasks, given the folder of downloaded data (``None`` where the user named none)."""
    checkpoint_every: int = 50
    """Updates between checkpoints."""
    start: str = ""
    """An entry of the zoo, or the folder of one, with whose weights training begins: a rule of the same settings, made
    to suit other tasks better. "" for weights drawn from the seed."""
    file: str = ""
    """Where it was loaded from: below the checkout, or as it was named. The entry that it makes says so."""
    activity: ClassVar[str] = "meta-training"

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")

    def trainer(
        self, root: Path | None = None, device: torch.device | str = "cpu", state: dict[str, Any] | None = None
    ) -> MetaTrainer | Search:
        """What trains the rule, from the beginning or from its state.

        Raises:
            ValueError: the rule that training is to begin with has other settings.
            OtherRunError: the state is of other settings.
            ZooError: that rule cannot be loaded.
        """
        rule: RuleConfig | UpdateRule = zoo.load_rule(self.start) if self.start else self.rule
        if isinstance(rule, UpdateRule):
            theirs, ours = rule.config.to_dict(), self.rule.to_dict()
            if different := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
                raise ValueError(
                    f"{self.name} cannot begin with {self.start}, a rule of other settings ({', '.join(different)}): "
                    "write rule=learnedopt.zoo.entry_info(NAME).config into the recipe"
                )
        trainer: MetaTrainer | Search
        if isinstance(self.training, SearchConfig):
            trainer = Search(rule, self.family(root), self.training, device)
        else:
            trainer = MetaTrainer(rule, self.family(root), self.training, device)
        trainer.origin = zoo.entry_info(self.start).sha256 if self.start else ""
        if state is not None:
            trainer.load_state_dict(state)
        return trainer

    def export(self, trainer: MetaTrainer | Search, folder: Path, card: str, made: Mapping[str, Any]) -> zoo.ZooEntry:
        """Write the best rule so far as a zoo entry; ``made`` says where and when it was made.

        Raises:
            ValueError: no validation has had a finite score yet, so that there is no best rule.
        """
        if not math.isfinite(trainer.best_score):
            raise ValueError(f"there is no rule to export yet: {self._before_the_first(trainer.update)}")
        return zoo.save_rule(
            trainer.best_rule(),
            folder,
            name=self.name,
            description=self.description,
            card=card,
            meta_training={
                "recipe": self.file or self.name,
                "tasks": self.tasks,
                "settings": self.training.to_dict() | {"copies": trainer.copies},
                **({"start": self.start, "start_sha256": trainer.origin} if self.start else {}),
                "updates": trainer.update,
                "best_update": trainer.best_update,
                # A search does not judge what comes out of it.
                **({"best_validation": trainer.best_score} if isinstance(trainer, MetaTrainer) else {}),
                **made,
            },
        )

    def _before_the_first(self, updates: int) -> str:
        """Why nothing was judged so far, and what to do."""
        if isinstance(self.training, SearchConfig):
            return "no generation was finished. The same command goes on from here"
        first = min(self.training.validate_every, self.training.updates)
        if updates < first:
            return (
                f"the first validation is after update {first}, and this run stands at {updates}. The same command "
                "goes on from here; a new run with a smaller --training.validate-every has one sooner"
            )
        return f"none of the {updates} updates ended in a validation with a finite score"


def load_recipe(source: str | os.PathLike[str]) -> Recipe:
    """The ``RECIPE`` of a Python file, or of ``meta_training/<name>.py`` below the current folder.

    Raises:
        FileNotFoundError: neither exists; the message lists the recipes there are.
        ValueError: the file defines no ``RECIPE``.
    """
    path = Path(source)
    if path.suffix != ".py":
        path = Path("meta_training") / f"{zoo.ALIASES.get(str(source), str(source)).replace('-', '_')}.py"
    if not path.is_file():
        known = sorted(p.stem for p in Path("meta_training").glob("[a-z]*.py"))
        raise FileNotFoundError(
            f"no recipe {str(source)!r}: {path} does not exist. Give a Python file that defines RECIPE"
            + (f", or one of {known}" if known else ", or run from a checkout, where meta_training/ has them")
        )
    module = load_file(path)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path} must define RECIPE, a learnedopt.meta.Recipe; it defines {type(recipe).__name__}")
    checkout = Path(__file__).resolve().parents[2]
    below = path.resolve().is_relative_to(checkout)
    return dataclasses.replace(recipe, file=(path.resolve().relative_to(checkout) if below else path).as_posix())


def overridden(recipe: Recipe, arguments: Sequence[str]) -> Recipe:
    """The recipe with settings replaced as on the command line: ``["--training.updates", "100"]``.

    Every setting of ``rule`` and ``training`` has an option, nested ones with more dots. Where one of several classes
    may stand, it is named with a colon, before its own settings:
    ``["training.estimator:pes", "--training.estimator.std", "0.02"]``. The order is free.

    Raises:
        SystemExit: an option is unknown, or its value is of the wrong type; a message went to stderr. With
            ``--help``, after a list of all options.
        ValueError: the settings make no sense together.
    """
    if not arguments:
        return recipe
    try:
        import tyro
    except ImportError as error:
        raise ImportError("settings on the command line need tyro: pip install 'learnedopt[train]'") from error
    settings = dataclasses.make_dataclass(
        "Settings", [("rule", type(recipe.rule)), ("training", type(recipe.training))]
    )
    # An option may only follow the choice of the class that it is of, and an inner choice that of the outer.
    choices = sorted(filter(_CHOICE.fullmatch, arguments), key=lambda choice: choice.count("."))
    options = [argument for argument in arguments if not _CHOICE.fullmatch(argument)]
    chosen: Any = tyro.cli(
        settings,
        prog=f"learnedopt meta-train {recipe.name}",
        description=f"Settings of the recipe {recipe.name}.",
        args=[*choices, *options],
        default=settings(recipe.rule, recipe.training),
        config=(tyro.conf.CascadeSubcommandArgs,),
    )
    return dataclasses.replace(recipe, rule=chosen.rule, training=chosen.training)
