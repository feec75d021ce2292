"""Recipes: the frozen configuration that makes a zoo entry, and runs of it that can be interrupted and trusted."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from learnedopt import zoo
from learnedopt.meta.trainer import MetaTrainConfig, MetaTrainer
from learnedopt.rules import RuleConfig
from learnedopt.tasks.base import TaskFamily


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
    training: MetaTrainConfig
    family: Callable[[Path | None], TaskFamily]
    """The tasks, given the folder of downloaded data (``None`` where the user named none)."""
    checkpoint_every: int = 50
    """Updates between checkpoints."""


def load_recipe(source: str | os.PathLike[str]) -> Recipe:
    """The ``RECIPE`` of a Python file, or of ``meta_training/<name>.py`` below the current folder.

    Raises:
        FileNotFoundError: neither exists; the message lists the recipes there are.
        ValueError: the file defines no ``RECIPE``.
    """
    path = Path(source)
    if path.suffix != ".py":
        path = Path("meta_training") / f"{str(source).replace('-', '_')}.py"
    if not path.is_file():
        known = sorted(p.stem for p in Path("meta_training").glob("[a-z]*.py"))
        raise FileNotFoundError(
            f"no recipe {str(source)!r}: {path} does not exist. Give a Python file that defines RECIPE"
            + (f", or one of {known}" if known else ", or run from a checkout, where meta_training/ has them")
        )
    spec = importlib.util.spec_from_file_location(f"learnedopt_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path} must define RECIPE, a learnedopt.meta.Recipe; it defines {type(recipe).__name__}")
    return recipe


class MetaTrainingRun:
    """A recipe being run in a folder: ``config.json``, ``log.jsonl``, ``checkpoint.pt``.

    A folder that holds a checkpoint is continued from it; the outcome is bit for bit that of a run without
    interruption (on the same machine and number of threads).

    Args:
        recipe: What to run.
        folder: Where; created if need be.
        root: Folder of downloaded data, passed to the recipe.
    """

    def __init__(self, recipe: Recipe, folder: str | os.PathLike[str], root: Path | None = None) -> None:
        self.recipe = recipe
        self.folder = Path(folder)
        self.trainer = MetaTrainer(recipe.rule, recipe.family(root), recipe.training)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoint = self.folder / "checkpoint.pt"
        self.commit = source_commit()
        if self._checkpoint.exists():
            saved = torch.load(self._checkpoint, weights_only=True)
            self.trainer.load_state_dict(saved["trainer"])
            self.commit = saved["commit"]
        config = {
            "recipe": recipe.name,
            "commit": self.commit,
            "rule": recipe.rule.to_dict(),
            "training": dataclasses.asdict(recipe.training),
        }
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def run(self, time_limit: float = float("inf")) -> Iterator[dict[str, Any]]:
        """Train on, yielding :meth:`MetaTrainer.run`'s records, each also a line of ``log.jsonl``.

        A checkpoint is written every ``checkpoint_every`` updates and at the end, also when the caller stops early
        (closes the generator) or an error ends training. Log lines past the checkpoint are dropped on resuming.
        """
        self._truncate_log()
        with open(self.folder / "log.jsonl", "a") as log:
            try:
                for record in self.trainer.run(time_limit):
                    log.write(json.dumps(record) + "\n")
                    if record["update"] % self.recipe.checkpoint_every == 0:
                        log.flush()
                        self.save()
                    yield record
            finally:
                log.flush()
                self.save()

    def save(self) -> None:
        """Write the checkpoint; the old one stays in place until the new one is whole."""
        temporary = self._checkpoint.with_suffix(".tmp")
        torch.save({"trainer": self.trainer.state_dict(), "commit": self.commit}, temporary)
        os.replace(temporary, self._checkpoint)

    def export(self, zoo_folder: str | os.PathLike[str]) -> zoo.ZooEntry:
        """Write the best rule so far as a zoo entry; an existing card is kept.

        Args:
            zoo_folder: The folder of all entries; the entry is the recipe's name in it.
        """
        recipe, trainer = self.recipe, self.trainer
        folder = Path(zoo_folder) / recipe.name
        card = folder / "card.md"
        training = recipe.training
        return zoo.save_rule(
            trainer.best_rule(),
            folder,
            name=recipe.name,
            description=recipe.description,
            card=card.read_text() if card.exists() else f"# {recipe.name}\n\n{recipe.description}\n",
            meta_training={
                "recipe": f"meta_training/{recipe.name.replace('-', '_')}.py",
                "commit": self.commit,
                "tasks": recipe.tasks,
                "horizon": list(training.horizon),
                "unroll_length": training.unroll_length,
                "updates": trainer.update,
                "best_update": trainer.best_update,
                "best_validation": trainer.best_score,
                "seconds": round(trainer.seconds),
                "hardware": f"{torch.get_num_threads()} CPU thread(s), {platform.machine()}",
                "torch": str(torch.__version__),
            },
        )

    def _truncate_log(self) -> None:
        log = self.folder / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if json.loads(line)["update"] <= self.trainer.update]
            log.write_text("".join(line + "\n" for line in lines))


def source_commit() -> str:
    """The commit of the checkout this package is imported from, ``-dirty`` if code differs from it, or ``unknown``."""
    package = Path(__file__).resolve().parents[1]
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=package,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()
