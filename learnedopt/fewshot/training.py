"""Training a learner on episodes, by recipes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from learnedopt.fewshot.backbones import BackboneConfig
from learnedopt.fewshot.datasets import load_classes
from learnedopt.fewshot.entries import LearnerEntry, learner_info, load_learner, save_learner
from learnedopt.fewshot.evaluate import evaluate
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape
from learnedopt.fewshot.sources import EpisodeSource, FewShotTask, Sinusoid, TrainingSource
from learnedopt.runs import OtherRunError, Record, Stop, Trainable, load_file


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


@dataclass(frozen=True)
class EpisodeShape:
    """How large episodes are; for regression ``ways`` counts for nothing."""

    ways: int = 5
    shots: int = 1
    queries: int = 15
    """Of each class."""


@dataclass(frozen=True)
class FewShotTrainConfig:
    """How a learner is trained. One *step* is one update by the outer optimizer."""

    steps: int
    episodes_per_step: int = 1
    """Episodes whose losses are averaged for a step (the *meta-batch*)."""
    learning_rate: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate stays, or falls towards zero, where it would be after the last step."""
    halve_every: int | None = None
    """Halve the learning rate after every so many steps, besides the schedule (Snell et al. 2017: 2000)."""
    clip_value: float | None = None
    """Cut every element of the gradient to at most this size (Finn et al. 2017, code: 10 on mini-ImageNet)."""
    clip_norm: float | None = None
    """Largest norm of the gradient; longer ones are scaled down."""
    validate_every: int = 500
    validation_episodes: int = 100
    """Frozen episodes of the validation classes that decide which weights are kept."""
    checkpoint_every: int = 100
    max_skipped: int = 100
    """Steps whose gradient, or what they would leave in running averages, is not finite are skipped; more than this
    many stop the run."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "episodes_per_step", "validate_every", "validation_episodes", "checkpoint_every")
        for name in (*counts, *(["halve_every"] if self.halve_every is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must not be negative, got {self.max_skipped}")
        for name in ("learning_rate", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.optimizer not in ("adam", "sgd") or self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"optimizer must be adam or sgd and schedule constant, linear or cosine, got {self.optimizer!r} and "
                f"{self.schedule!r}"
            )

    def learning_rate_at(self, step: int) -> float:
        """The outer learning rate of a step, counted from 0."""
        share = step / self.steps
        falling = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}
        halvings = 0 if self.halve_every is None else step // self.halve_every
        return self.learning_rate * falling[self.schedule] * 0.5**halvings


@dataclass(frozen=True)
class FewShotRecipe:
    """How one trained learner is made."""

    name: str
    description: str
    """One line: what it is."""
    data: str
    """A name in :data:`~learnedopt.fewshot.DATASETS`, or ``sinusoid``."""
    learner: LearnerConfig
    backbone: BackboneConfig
    train: EpisodeShape
    """Episodes that it is trained on."""
    test: EpisodeShape
    """Episodes that it is validated on, and made for."""
    training: FewShotTrainConfig
    start: str = ""
    """A trained learner, a name in the zoo or a folder, with whose backbone training begins, and with a read-out of
    zeros; "" for random weights."""
    activity: ClassVar[str] = "few-shot training"

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        return self.training.checkpoint_every

    def trainer(
        self, root: Path | None = None, device: torch.device | str = "cpu", state: dict[str, Any] | None = None
    ) -> FewShotTrainer:
        """What trains the learner, from the beginning or from its state.

        Raises:
            ValueError: the backbone that training is to begin with is another network.
            OtherRunError: the state is of other settings.
            ZooError: the learner that training is to begin with cannot be loaded.
        """
        trainer = FewShotTrainer(self, root, device)
        if state is not None:
            trainer.load_state_dict(state)
        elif self.start:
            trainer.begin()
        return trainer

    def export(self, trainer: FewShotTrainer, folder: Path, card: str, made: Mapping[str, Any]) -> LearnerEntry:
        """Write the best learner so far as an entry of the zoo; ``made`` says where and when it was made.

        Raises:
            ValueError: there has been no validation yet.
        """
        return save_learner(
            trainer.best_learner(),
            folder,
            name=self.name,
            description=self.description,
            backbone=self.backbone,
            card=card,
            training={
                "data": self.data,
                "train": asdict(self.train),
                "test": asdict(self.test),
                "settings": asdict(self.training),
                **({"start": self.start} if self.start else {}),
                "steps": trainer.step,
                "best_step": trainer.best_step,
                "best_validation": trainer.best_score,
                **made,
            },
        )


def load_recipes(source: str | os.PathLike[str] = "meta_training/fewshot") -> dict[str, FewShotRecipe]:
    """The recipes in ``RECIPES`` of a Python file, or of all files of a folder, by name.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a file defines no list of recipes, or two have one name.
    """
    path = Path(source)
    files = [path] if path.suffix == ".py" else sorted(path.glob("[a-z]*.py"))
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"no recipes in {path}: give a Python file that defines RECIPES, or run from a checkout, where "
            "meta_training/fewshot/ has them"
        )
    found: dict[str, FewShotRecipe] = {}
    for file in files:
        recipes = getattr(load_file(file), "RECIPES", None)
        if not isinstance(recipes, list) or not all(isinstance(recipe, FewShotRecipe) for recipe in recipes):
            raise ValueError(f"{file} must define RECIPES, a list of FewShotRecipe")
        for recipe in recipes:
            if recipe.name in found:
                raise ValueError(f"two recipes have the name {recipe.name!r}")
            found[recipe.name] = recipe
    return found


def load_fewshot_recipe(name: str) -> FewShotRecipe:
    """A recipe of ``meta_training/fewshot`` by name, or of another file as ``FILE.py:NAME``.

    Raises:
        ValueError: there is no such recipe; the message lists those there are. And as :func:`load_recipes`.
    """
    if name.endswith(".py"):
        raise ValueError(
            f"say which recipe of {name} is meant, as {name}:NAME; there are {', '.join(load_recipes(name))}"
        )
    file, _, short = name.rpartition(":")
    recipes = load_recipes(file) if file else load_recipes()
    if short not in recipes:
        raise ValueError(f"no recipe {short!r}; there are {', '.join(recipes)}")
    return recipes[short]


def episode_source(
    data: str,
    shape: EpisodeShape,
    part: Literal["train", "validation", "test"],
    root: str | os.PathLike[str] | None = None,
) -> EpisodeSource:
    """Episodes of one part of a data set, ready to be drawn.

    Raises as :func:`load_classes` and :class:`FewShotTask`.
    """
    if data == "sinusoid":
        return Sinusoid(shape.shots, shape.queries, part)
    return FewShotTask(load_classes(data, part, root), shape.ways, shape.shots, shape.queries)


class FewShotTrainer(Trainable):
    """Trains a learner by a recipe; deterministic, and resumable bit for bit.

    Args:
        recipe: What to train.
        root: Folder of downloaded data.
        device: Where to train.
    """

    unit: ClassVar[str] = "step"
    loss: ClassVar[str] = "loss"

    def __init__(
        self,
        recipe: FewShotRecipe,
        root: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe = recipe
        config = recipe.training
        source = episode_source(recipe.data, recipe.train, "train", root)
        self._device = torch.device(device)
        self.source = TrainingSource(source, config.episodes_per_step, self._device)
        validation = episode_source(recipe.data, recipe.test, "validation", root)
        self._validation = validation.frozen(config.validation_episodes)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.learner = self._built(self.generator)
        optimizers: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        make: Any = optimizers[config.optimizer]
        self.optimizer: torch.optim.Optimizer = make(self.learner.parameters(), lr=config.learning_rate)
        self.step = 0
        self.skipped = 0
        self.best_score = -math.inf
        self.best_step = 0
        self.best_weights = self._weights()

    @property
    def done(self) -> int:
        return self.step

    @property
    def total(self) -> int:
        return self.recipe.training.steps

    def records(self, stop: Stop) -> Iterator[Record]:
        """Train on, yielding one record per step; stop before the one where ``stop`` says so.

        A record holds ``step``, ``loss``, and after a validation ``validation`` (mean accuracy, or minus the median
        squared error) and ``best``.

        Raises:
            TrainingError: more than ``max_skipped`` steps were skipped.
        """
        while not (self.finished or stop()):
            record: Record = {"step": self.step + 1, "loss": self._step()}
            if self.step % self.recipe.training.validate_every == 0 or self.finished:
                record |= self._validate()
            yield record

    def best_learner(self) -> Learner:
        """The learner with the weights of the best validation so far, in evaluation mode.

        Settings that the method leaves to validation (:meth:`Learner.choose_settings`) are chosen on the validation
        episodes.

        Raises:
            ValueError: there has been no validation yet.
        """
        self._check_validated()
        learner = self._built(torch.Generator().manual_seed(0)).eval()
        learner.load_state_dict(self.best_weights)
        learner.choose_settings(self._validation)
        return learner

    def _check_validated(self) -> None:
        if not self.best_step:
            every = self.recipe.training.validate_every
            why = f"no validation in the {self.step} step(s) so far, and there is one every {every}"
            if self.finished or self.step >= every:
                why = (
                    f"no validation of the {self.step} step(s) so far had a finite error; {self.skipped} step(s) were "
                    "skipped, as their gradient or statistics were not finite"
                )
            raise ValueError(f"there is no best learner yet: {why}")

    def _built(self, generator: torch.Generator) -> Learner:
        source, recipe = self.source.source, self.recipe
        ways = None if source.ways is None else recipe.test.ways
        shape = LearnerShape(source.example_shape, ways, source.num_classes)
        return recipe.learner.build(recipe.backbone, shape, generator).to(self._device)

    def begin(self) -> None:
        """Take over the backbone that the recipe starts from."""
        _take_over(self.learner, self.recipe)
        self.best_weights = self._weights()

    def _step(self) -> float:
        config = self.recipe.training
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.learner.train()
        self.learner.set_progress(self.step / config.steps)
        self.optimizer.zero_grad()
        buffers = list(self.learner.buffers())
        before = [buffer.clone() for buffer in buffers]
        # What a backbone draws for itself, as dropout does, depends on the step alone, and so outlives an interruption.
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(((config.seed << 32) + self.step) % 2**63)
            loss = self.learner.training_step(self.source, self.generator)
            if loss.requires_grad:
                loss.backward()
        parameters = [p for p in self.learner.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.clip_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, config.clip_value)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        finite = [value.isfinite().all() for value in (norm.to(self._device), *buffers)]
        if bool(torch.stack(finite).all()):
            self.optimizer.step()
        else:
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)
            self._skip()
        self.step += 1
        return loss.item()

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped > self.recipe.training.max_skipped:
            raise TrainingError(
                f"{self.skipped} steps had a gradient or statistics that are not finite, the last at step {self.step}; "
                "lower the learning rates, clip the gradient, or look for bad images"
            )

    def _validate(self) -> dict[str, float]:
        """Remember the weights if they are the best so far, under the settings that suit them best."""
        judged = self.learner.with_config()
        judged.choose_settings(self._validation)
        result = evaluate(judged, self._validation)
        # A few diverged regressions own the mean, and would make the choice by chance.
        score = result.mean if result.metric == "accuracy" else -result.median
        if score > self.best_score:
            self.best_score, self.best_step, self.best_weights = score, self.step, self._weights()
        return {"validation": score, "best": self.best_score}

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.learner.state_dict().items()}

    def settings(self) -> dict[str, Any]:
        """What must agree for training to be continued, as JSON types."""
        recipe = self.recipe
        values = {
            "recipe": recipe.name,
            "data": recipe.data,
            "learner": recipe.learner.to_dict(),
            "backbone": recipe.backbone.to_dict(),
            "train": asdict(recipe.train),
            "test": asdict(recipe.test),
            "training": asdict(recipe.training),
            **({"start": recipe.start} if recipe.start else {}),
        }
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if different := list(_different(state.get("settings", {}), self.settings())):
            raise OtherRunError(
                f"it has other settings ({'; '.join(different)}); continue it with the same, or choose another folder"
            )
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for name in _COUNTERS:
            setattr(self, name, state[name])


def _take_over(learner: Learner, recipe: FewShotRecipe) -> None:
    """Put the backbone that a recipe starts from into its learner; read-outs are for other classes.

    One of zeros takes the place of the read-out: it prefers no class, and does not make the first updates of an
    inner loop move the features for the sake of random weights.
    """
    name, prefix = recipe.start, "model.backbone."
    entry = learner_info(name)
    example = learner.shape.example_shape
    if entry.backbone != recipe.backbone or entry.shape.example_shape != example:
        raise ValueError(
            f"{recipe.name} cannot begin with {name}: that has the backbone {entry.backbone} for examples of "
            f"shape {entry.shape.example_shape}, and this {recipe.backbone} for {example}"
        )
    trained, own = load_learner(name).state_dict(), learner.state_dict()
    shared = [key for key in own if key.startswith(prefix) and key in trained]
    for key in shared:
        theirs, ours = trained[key].shape, own[key].shape
        if theirs != ours[len(ours) - len(theirs) :]:
            raise ValueError(
                f"{recipe.name} cannot begin with {name}: that has {key} of shape {tuple(theirs)}, one row "
                f"for each of its inner steps maybe, and this of shape {tuple(ours)}"
            )
    with torch.no_grad():
        for key in shared:
            own[key].copy_(trained[key])  # in every row, where there is one for each inner step
        for key in own:
            if key.startswith("model.head."):
                own[key].zero_()


def _different(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that are not the same, each with both values."""
    for name in sorted(theirs.keys() | ours.keys()):
        before, now = theirs.get(name), ours.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _different(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} was {before!r}, is {now!r}"


_COUNTERS = ("step", "skipped", "seconds", "best_score", "best_step", "best_weights")
