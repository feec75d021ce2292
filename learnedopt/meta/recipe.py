"""Recipes: the frozen configuration that makes a zoo entry, and runs of it that can be interrupted and trusted."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from learnedopt import zoo
from learnedopt.meta.config import MetaTrainConfig
from learnedopt.meta.search import Search, SearchConfig
from learnedopt.meta.trainer import MetaTrainer
from learnedopt.rules import RuleConfig, UpdateRule
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
    training: MetaTrainConfig | SearchConfig
    """By gradients or their estimates (:class:`MetaTrainer`), or by search over a few weights (:class:`Search`)."""
    family: Callable[[Path | None], TaskFamily]
    """The tasks, given the folder of downloaded data (``None`` where the user named none)."""
    checkpoint_every: int = 50
    """Updates between checkpoints."""
    start: str = ""
    """An entry of the zoo, or the folder of one, with whose weights training begins: a rule of the same settings, made
    to suit other tasks better. "" for weights drawn from the seed."""


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
    module = load_file(path)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path} must define RECIPE, a learnedopt.meta.Recipe; it defines {type(recipe).__name__}")
    return recipe


def _trainer(recipe: Recipe, root: Path | None, device: torch.device | str) -> MetaTrainer | Search:
    rule: RuleConfig | UpdateRule = recipe.rule
    if recipe.start:
        rule = zoo.load_rule(recipe.start)
        theirs, ours = rule.config.to_dict(), recipe.rule.to_dict()
        if different := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
            raise ValueError(
                f"{recipe.name} cannot begin with {recipe.start}, a rule of other settings ({', '.join(different)}): "
                "write rule=learnedopt.zoo.entry_info(NAME).config into the recipe"
            )
    if isinstance(recipe.training, SearchConfig):
        return Search(rule, recipe.family(root), recipe.training, device)
    return MetaTrainer(rule, recipe.family(root), recipe.training, device)


def load_file(path: Path) -> ModuleType:
    """The module that a Python file outside the package is."""
    spec = importlib.util.spec_from_file_location(f"learnedopt_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A recipe may define dataclasses, such as a task family of its own, and those look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def overridden(recipe: Recipe, arguments: Sequence[str]) -> Recipe:
    """The recipe with settings replaced as on the command line: ``["--training.updates", "100"]``.

    Every setting of ``rule`` and ``training`` has an option, nested ones with more dots. Where one of several classes
    may stand, it is named with a colon, before its own settings:
    ``["training.estimator:pes", "--training.estimator.std", "0.02"]``.

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
    chosen: Any = tyro.cli(
        settings,
        prog=f"learnedopt meta-train {recipe.name}",
        description=f"Settings of the recipe {recipe.name}.",
        args=list(arguments),
        default=settings(recipe.rule, recipe.training),
    )
    return dataclasses.replace(recipe, rule=chosen.rule, training=chosen.training)


class MetaTrainingRun:
    """A recipe being run in a folder: ``config.json``, ``log.jsonl``, ``checkpoint.pt``.

    A folder that holds a checkpoint is continued from it; the outcome is bit for bit that of a run without
    interruption (on the same machine and number of threads).

    Where processes train together, each makes this object and calls its methods alike; the first writes the files.

    Args:
        recipe: What to run.
        folder: Where; created if need be.
        root: Folder of downloaded data, passed to the recipe.
        device: Where to train. A run may move: a checkpoint made on one device continues on another.
        tensorboard: Write the numbers of the log for TensorBoard too.

    Raises:
        ValueError: the folder's checkpoint is of another recipe, was made with other settings, or cannot be read; or
            the folder holds something else under the names of a run's files; or the rule that training is to begin
            with has other settings.
        ZooError: that rule cannot be loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | os.PathLike[str],
        root: Path | None = None,
        device: torch.device | str = "cpu",
        tensorboard: bool = False,
    ) -> None:
        self.recipe = recipe
        self.folder = Path(folder)
        self.tensorboard = tensorboard
        self.trainer = _trainer(recipe, root, device)
        self._start = zoo.entry_info(recipe.start).sha256 if recipe.start else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoint = self.folder / "checkpoint.pt"
        self.commit = source_commit()
        if self._checkpoint.exists():
            self._resume()
        else:
            check_folder(self.folder, recipe.name)
        config = {
            "recipe": recipe.name,
            "commit": self.commit,
            "rule": recipe.rule.to_dict(),
            "training": recipe.training.to_dict(),
            "start": recipe.start,
            "copies": self.trainer.copies,
            "backend": self.trainer.backend,
            "device": str(device),
            "processes": self.trainer.ranks.size,
        }
        if self._writes:
            write_config(self.folder / "config.json", config)

    @property
    def _writes(self) -> bool:
        return self.trainer.ranks.rank == 0

    def run(
        self, time_limit: float = float("inf"), stop: Callable[[], bool] = lambda: False
    ) -> Generator[dict[str, Any]]:
        """Train on, yielding :meth:`MetaTrainer.run`'s records, each also a line of ``log.jsonl``.

        A checkpoint is written every ``checkpoint_every`` updates and at the end, also when the caller stops early
        (closes the generator). An exception in the middle of an update leaves the last checkpoint as it is: half an
        update cannot be continued exactly. Log lines past the checkpoint are dropped on resuming.
        """
        with ExitStack() as stack:
            writers = self._writers(stack)
            try:
                for record in self.trainer.run(time_limit, stop):
                    for write, _ in writers:
                        write(record)
                    if record["update"] % self.recipe.checkpoint_every == 0:
                        self._save(writers)
                    yield record
            except GeneratorExit:
                self._save(writers)
                raise
            self._save(writers)

    def save(self) -> None:
        """Write the checkpoint; the old one stays in place until the new one is whole."""
        names = {"recipe": self.recipe.name, "commit": self.commit, "start": self._start}
        content = names | {"trainer": self.trainer.state_dict()}
        if self._writes:
            write_checkpoint(self._checkpoint, content)

    def export(self, zoo_folder: str | os.PathLike[str]) -> zoo.ZooEntry:
        """Write the best rule so far as a zoo entry; an existing card is kept.

        Args:
            zoo_folder: The folder of all entries; the entry is the recipe's name in it.

        Raises:
            ValueError: no validation has had a finite score yet, so that there is no best rule.
        """
        recipe, trainer = self.recipe, self.trainer
        if not math.isfinite(trainer.best_score):
            raise ValueError(
                f"there is no rule to export: none of the {trainer.update} update(s) so far ended in a validation with "
                "a finite score"
            )
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
                "settings": training.to_dict() | {"copies": trainer.copies},
                **({"start": recipe.start, "start_sha256": self._start} if recipe.start else {}),
                "updates": trainer.update,
                "best_update": trainer.best_update,
                # A search does not judge what comes out of it.
                **({"best_validation": trainer.best_score} if isinstance(trainer, MetaTrainer) else {}),
                "seconds": round(trainer.seconds),
                "hardware": hardware(next(trainer.rule.parameters()).device),
                "torch": str(torch.__version__),
            },
        )

    def _resume(self) -> None:
        saved = read_checkpoint(self._checkpoint, ("trainer", "commit"))
        # Nothing else tells apart two recipes that differ in their tasks alone.
        name = saved.get("recipe", self.recipe.name)
        if name != self.recipe.name:
            raise ValueError(f"{self.folder} holds a run of the recipe {name!r}, not {self.recipe.name!r}")
        if saved.get("start", "") != self._start:
            raise ValueError(f"{self.folder} holds a run that began with other weights than those of the recipe now")
        try:
            self.trainer.load_state_dict(saved["trainer"])
        except ValueError as error:
            raise ValueError(f"{self.folder} holds another run: {error}") from error
        self.commit = saved["commit"]

    def _writers(self, stack: ExitStack) -> list[_Writer]:
        """Where records go: how to write one, and how to make sure that all so far are on disk."""
        if not self._writes:
            return []
        truncate_log(self.folder / "log.jsonl", self.trainer.update)
        log = stack.enter_context((self.folder / "log.jsonl").open("a"))
        writers: list[_Writer] = [(lambda record: log.write(json.dumps(record) + "\n"), log.flush)]
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("the TensorBoard log needs tensorboard: pip install tensorboard") from error
            board: Any = SummaryWriter(self.folder, purge_step=self.trainer.update + 1)
            stack.callback(board.close)
            writers.append((lambda record: _scalars(board, record), board.flush))
        return writers

    def _save(self, writers: list[_Writer]) -> None:
        """Checkpoints follow the log, so that it has a line for every update that they know of."""
        for _, flush in writers:
            flush()
        self.save()


def check_folder(folder: Path, recipe: str) -> None:
    """Refuse a folder without a checkpoint in which a run would overwrite what no run of the recipe has written.

    Raises:
        ValueError: it has a ``config.json`` of something else, or a ``log.jsonl`` with none.
    """
    config, log = folder / "config.json", folder / "log.jsonl"
    if not config.exists() and not log.exists():
        return
    try:
        found = json.loads(config.read_text())
    except (FileNotFoundError, ValueError):
        found = None
    # A run that was killed before its first checkpoint has left both.
    if not (isinstance(found, dict) and found.get("recipe") == recipe):
        name = config.name if config.exists() else log.name
        raise ValueError(f"{folder} has a {name} that is not of a run of {recipe}: choose another folder for the run")


_Writer = tuple[Callable[[dict[str, Any]], Any], Callable[[], Any]]


def write_config(path: Path, content: dict[str, Any]) -> None:
    """Write as JSON, complete or not at all: a run that is killed meanwhile must know its folder again."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write with ``torch.save``; the old checkpoint stays in place until the new one is whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def read_checkpoint(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What :func:`write_checkpoint` wrote, on the CPU. Raises ``ValueError`` if it is damaged or lacks a key."""
    data = io.BytesIO(path.read_bytes())
    try:
        saved: dict[str, Any] = torch.load(data, map_location="cpu", weights_only=True)
        for key in keys:
            saved[key]
    except Exception as error:  # which one depends on where the damage is
        raise ValueError(
            f"{path} is damaged or no checkpoint of a meta-training run ({type(error).__name__}); "
            "remove it to start anew, or restore it"
        ) from error
    return saved


def truncate_log(log: Path, lines: int) -> None:
    """Keep the first ``lines`` lines; those beyond a checkpoint, the last maybe unfinished, are written again."""
    if log.exists():
        with log.open("rb+") as file:
            for _ in range(lines):
                file.readline()
            file.truncate(file.tell())


def _scalars(board: Any, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if name != "update" and isinstance(value, int | float):
            board.add_scalar(name, value, record["update"])


def hardware(device: torch.device) -> str:
    """What ran: the name of the GPU, or the number of threads and the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread(s), {platform.machine()}"


def source_commit() -> str:
    """The commit of the checkout this package is imported from, ``-dirty`` if code differs from it, or ``unknown``."""
    package = Path(__file__).resolve().parents[1]
    # An environment inside some other project's checkout must not pass off that project's commit as ours.
    if not (package.parent / ".git").exists():
        return "unknown"
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
