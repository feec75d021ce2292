"""How a rule is trained: every setting of a meta-training run that is not its tasks or its rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from learnedopt.meta.estimators import Estimator, FullBPTT, MetaObjective, TruncatedBPTT
from learnedopt.meta.evolution import ES, PES, FullES, VarianceMixture
from learnedopt.meta.imitation import AdamTeacher, Imitation, SGDTeacher, Teacher
from learnedopt.meta.objectives import OBJECTIVES, WEIGHTINGS
from learnedopt.tasks.base import Split


@dataclass(frozen=True)
class Growing:
    """The longest horizon grows linearly from the shortest to its full length."""

    updates: int
    """Over how many updates."""

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"a curriculum must grow over at least 1 update, got {self.updates}")


@dataclass(frozen=True)
class Stages:
    """Every episode of a stage has its length, rounded up to whole windows; ``horizon`` is not used.

    Validation runs at the length of the next stage. A stage is over after ``patience`` validations without a better
    one: its best weights go on to the next. The end of the last is the end of training; it has to do better than the
    one before, whose weights are kept if it does not.

    Source: Chen et al. 2020 (arXiv:2010.09089), section 3.1.
    """

    lengths: tuple[int, ...]
    """Inner steps of an episode, stage by stage."""
    patience: int
    """Validations without a better one after which a stage is over."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"stages must be lengths of at least 1, got {self.lengths}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


ESTIMATORS: dict[str, type[Estimator]] = {
    "truncated-bptt": TruncatedBPTT,
    "full-bptt": FullBPTT,
    "es": ES,
    "full-es": FullES,
    "pes": PES,
    "variance-mixture": VarianceMixture,
}
"""Every estimator of the meta-gradient by name, the one it has on the command line."""

TEACHERS: dict[str, type[Teacher]] = {"adam-teacher": AdamTeacher, "sgd-teacher": SGDTeacher}
"""Every teacher by name, the one it has on the command line."""

CURRICULA: dict[str, type[Growing] | type[Stages]] = {"growing": Growing, "stages": Stages}
"""Every curriculum by name, the one it has on the command line."""

Backend = Literal["auto", "reference", "native", "compiled"]


@dataclass(frozen=True)
class MetaTrainConfig:
    """How a rule is trained. One *update* is one outer-optimizer step on one window of some running episodes."""

    updates: int
    unroll_length: int = 20
    """Truncation window: inner steps between outer updates."""
    horizon: tuple[int, int] = (100, 100)
    """Inner steps of an episode, log-uniform in this range, rounded to whole windows."""
    curriculum: Growing | Stages | None = None
    """How episodes become longer while the rule is trained; ``None`` for the same ``horizon`` all along."""
    episodes: int = 1
    """Windows per update, each of another episode with its own task structure; their meta-gradients are averaged.
    Processes that train together share them, so it must be a multiple of their number."""
    pool: int = 1
    """Episodes under way (at least ``episodes``), served in turn: successive updates see different tasks."""
    copies: int | Literal["auto"] = 1
    """Copies of each structure: initialisations and data of their own. ``"auto"``: as many as half of the free memory
    holds, at most 256; found at the start of a run and kept with it."""
    objective: str = "loss"
    """Name in :data:`~learnedopt.meta.OBJECTIVES`."""
    weighting: str = "uniform"
    """Weights of the steps of a window, a name in :data:`~learnedopt.meta.WEIGHTINGS`."""
    split: Split = "train"
    """Where the losses of the meta-objective are taken: on training batches, or on held-out ones."""
    estimator: TruncatedBPTT | FullBPTT | ES | FullES | PES | VarianceMixture = field(default_factory=TruncatedBPTT)
    """How meta-gradients are estimated."""
    imitation: Imitation | None = None
    """A teacher to imitate in some of the episodes."""
    learning_rate: float = 1e-3
    """Adam's, for the meta-parameters; it falls to ``final_learning_rate`` along a half cosine."""
    final_learning_rate: float = 1e-3
    clip_norm: float | None = None
    """Largest norm of the meta-gradient; longer ones are scaled down."""
    ema_decay: float | None = None
    """Validate and keep an exponential moving average of the meta-parameters instead of themselves."""
    validate_every: int = 500
    validation_episodes: int = 1
    validation_copies: int = 20
    validation_horizon: int = 100
    patience: int | None = None
    """Stop after this many validations without a better one; ``None`` trains to the end. The best is kept anyway.
    Stages have one of their own."""
    max_skipped: int = 100
    """Windows with a non-finite meta-loss or meta-gradient are skipped; more than this many stop the run."""
    backend: Backend = "reference"
    """What computes the rule: ``"reference"``, the rule itself; ``"native"``, compiled kernels with the same results up
    to rounding, on the CPU; ``"compiled"``, ``torch.compile``, and on CUDA captured graphs; ``"auto"``, native where it
    can be had, else the reference. Estimators that perturb the weights run on the reference only."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ["updates", "unroll_length", "episodes", "pool", "validate_every"]
        positive += ["validation_episodes", "validation_copies", "validation_horizon"]
        if self.copies != "auto":
            positive.append("copies")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.horizon[0] <= self.horizon[1]:
            raise ValueError(f"horizon must be (shortest, longest) with 1 <= shortest <= longest, got {self.horizon}")
        for what, name, known in (
            ("objective", self.objective, OBJECTIVES),
            ("weighting", self.weighting, WEIGHTINGS),
            ("backend", self.backend, get_args(Backend)),
            ("split", self.split, get_args(Split)),
        ):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {sorted(known)}")
        if not (self.learning_rate > 0 and self.final_learning_rate >= 0):
            raise ValueError("learning_rate must be positive and final_learning_rate not negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for none, got {self.clip_norm}")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be between 0 and 1, or None for no average, got {self.ema_decay}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, or None for no early stopping, got {self.patience}")
        if isinstance(self.curriculum, Stages) and self.patience is not None:
            raise ValueError("stages have a patience of their own: leave out that of the training")
        # Each copy has weights of its own there, which kernels do not take and torch.compile silently passes by.
        if self.backend in ("native", "compiled") and self.estimator.perturbs_weights:
            raise ValueError(
                f"the {self.backend} backend cannot run the estimator {kind(self.estimator)!r}, which perturbs "
                "weights: use backend='reference' or 'auto'"
            )
        if self.copies != "auto" and self.copies < self.estimator.fewest_copies:
            raise ValueError(
                f"the estimator {kind(self.estimator)!r} needs at least {self.estimator.fewest_copies} copies of each "
                f"task, got {self.copies}"
            )

    @property
    def meta_objective(self) -> MetaObjective:
        """The objective, its weighting and its split as one."""
        return MetaObjective(self.objective, self.weighting, self.split)

    def horizons(self, update: int, stage: int) -> tuple[float, float]:
        """The inner steps of the shortest and of the longest episode that may begin at an update."""
        if isinstance(self.curriculum, Stages):
            return (self.curriculum.lengths[stage],) * 2
        low, longest = self.horizon
        grown = 1.0 if self.curriculum is None else min(1.0, update / self.curriculum.updates)
        return low, low + grown * (longest - low)

    @property
    def longest_horizon(self) -> int:
        """The inner steps of the longest episode of the whole training."""
        return max(self.curriculum.lengths) if isinstance(self.curriculum, Stages) else self.horizon[1]

    @property
    def last_stage(self) -> int:
        """The number of the last stage; the first is 0, and the only one where there are none."""
        return len(self.curriculum.lengths) - 1 if isinstance(self.curriculum, Stages) else 0

    def validation_horizon_at(self, stage: int) -> int:
        """The inner steps of validation."""
        if isinstance(self.curriculum, Stages):
            return self.curriculum.lengths[min(stage + 1, self.last_stage)]
        return self.validation_horizon

    def out_of_patience(self, updates: int) -> bool:
        """Whether to give up a stage, or all of training, so many updates after the last better validation."""
        patience = self.curriculum.patience if isinstance(self.curriculum, Stages) else self.patience
        return patience is not None and updates >= patience * self.validate_every

    def learning_rate_at(self, update: int) -> float:
        """The outer learning rate of an update, counted from 0."""
        remaining = 0.5 * (1.0 + math.cos(math.pi * min(1.0, update / self.updates)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * remaining

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types; ``kind`` says which estimator, which curriculum and which teacher."""
        values = asdict(self)
        values["estimator"] = {"kind": kind(self.estimator)} | values["estimator"]
        if self.curriculum is not None:
            values["curriculum"] = {"kind": kind(self.curriculum)} | values["curriculum"]
        if self.imitation is not None:
            values["imitation"]["teacher"] = {"kind": kind(self.imitation.teacher)} | values["imitation"]["teacher"]
        return values


@dataclass(frozen=True)
class SearchConfig:
    """How a few weights of a rule are searched for; all others stay as they start."""

    updates: int
    """Generations."""
    coordinates: tuple[tuple[str, float, float], ...]
    """The weights, such as ``"readout.bias[0]"`` or ``"readout.weight[0,9]"``, each with the value it starts from and
    its scale: how far from there it may well have to go."""
    population: int = 12
    """Settings tried in each generation."""
    std: float = 0.5
    """Standard deviation of the first generation, in units of the scales."""
    horizon: int = 600
    """Inner steps of an episode."""
    copies: int = 2
    """Copies of each structure."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("population", 4), ("horizon", 6), ("copies", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite, got {self.std}")
        if len(self.coordinates) < 2:
            raise ValueError(f"at least two coordinates are needed, got {len(self.coordinates)}")
        for name, start, scale in self.coordinates:
            if not (math.isfinite(start) and 0.0 < scale < math.inf):
                raise ValueError(f"{name} needs a finite start and a positive, finite scale, got {start} and {scale}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types; ``kind`` tells them from a :class:`MetaTrainConfig`."""
        return {"kind": "search"} | asdict(self)


def from_flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """What :meth:`MetaTrainConfig.to_dict` gives, also from the settings of a run begun before there were unions.

    Those had ``curriculum_updates``, ``stages``, ``imitation_share`` and ``imitation_updates``.
    """
    if "curriculum_updates" not in values:
        return dict(values)
    old = dict(values)
    growing, stages = old.pop("curriculum_updates"), old.pop("stages")
    share, updates = old.pop("imitation_share"), old.pop("imitation_updates")
    curriculum = {"kind": "growing", "updates": growing} if growing else None
    if stages:
        curriculum = {"kind": "stages", "lengths": stages, "patience": old["patience"]}
        old["patience"] = None
    if old["imitation"] is not None:
        old["imitation"] = old["imitation"] | {"share": share, "updates": updates}
    return old | {"curriculum": curriculum}


def kind(settings: Estimator | Teacher | Growing | Stages) -> str:
    """The name by which a class of settings is known; that of the class, if it is registered nowhere."""
    names = {known: name for name, known in {**ESTIMATORS, **TEACHERS, **CURRICULA}.items()}
    return names.get(type(settings), type(settings).__name__)
