"""Curricula: episodes that become longer while a rule is trained."""

from __future__ import annotations

from dataclasses import dataclass


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
