"""How a rule is trained: every setting of a meta-training run that is not its tasks or its rule."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from learnedopt.meta.estimators import Estimator, FullBPTT, MetaObjective, TruncatedBPTT
from learnedopt.meta.evolution import ES, PES, FullES, VarianceMixture
from learnedopt.meta.imitation import AdamTeacher, Imitation, SGDTeacher, Teacher
from learnedopt.meta.objectives import OBJECTIVES, WEIGHTINGS
from learnedopt.tasks.base import Split

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

Backend = Literal["auto", "reference", "native", "compiled"]


@dataclass(frozen=True)
class MetaTrainConfig:
    """How a rule is trained. One *update* is one outer-optimizer step on one window of some running episodes."""

    updates: int
    unroll_length: int = 20
    """Truncation window: inner steps between outer updates."""
    horizon: tuple[int, int] = (100, 100)
    """Inner steps of an episode, log-uniform in this range, rounded to whole windows."""
    curriculum_updates: int = 0
    """The longest horizon grows linearly from the shortest to its full length over this many updates; 0 for none."""
    stages: tuple[int, ...] = ()
    """Curriculum of Chen et al. 2020 (arXiv:2010.09089, section 3.1), instead of ``horizon``: every episode of a stage
    has this many steps, rounded up to whole windows. Validation runs at the length of the next stage. After
    ``patience`` validations without a better one a stage is over: its best weights go on to the next. The end of the
    last is the end of training; it has to do better than the one before, whose weights are kept if it does not."""
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
    imitation_share: float = 0.0
    """The probability that an episode is one of imitation."""
    imitation_updates: int | None = None
    """Only episodes that begin before this update imitate; ``None`` for all along."""
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
    """Stop after this many validations without a better one; ``None`` trains to the end. The best is kept anyway."""
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
        if not 0.0 <= self.imitation_share <= 1.0:
            raise ValueError(f"imitation_share must be between 0 and 1, got {self.imitation_share}")
        if (self.imitation_share > 0) != (self.imitation is not None):
            raise ValueError("imitation needs both a teacher (imitation) and a share of the episodes (imitation_share)")
        if self.imitation_updates is not None and self.imitation_updates < 1:
            raise ValueError(f"imitation_updates must be at least 1, or None, got {self.imitation_updates}")
        if self.stages and (min(self.stages) < 1 or self.patience is None or self.curriculum_updates):
            raise ValueError(
                f"stages must be lengths of at least 1, need a patience, and exclude curriculum_updates; got stages "
                f"{self.stages}, patience {self.patience}, curriculum_updates {self.curriculum_updates}"
            )
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

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types; ``kind`` says which estimator and which teacher."""
        values = asdict(self)
        values["estimator"] = {"kind": kind(self.estimator)} | values["estimator"]
        if self.imitation is not None:
            values["imitation"]["teacher"] = {"kind": kind(self.imitation.teacher)} | values["imitation"]["teacher"]
        return values


def kind(settings: Estimator | Teacher) -> str:
    """The name by which a class of settings is known; that of the class, if it is registered nowhere."""
    names = {estimator: name for name, estimator in {**ESTIMATORS, **TEACHERS}.items()}
    return names.get(type(settings), type(settings).__name__)
