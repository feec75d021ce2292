"""How good a learner is on episodes it has never seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.learner import Learner
from learnedopt.fewshot.sources import EpisodeList


@dataclass(frozen=True)
class Evaluation:
    """One number per episode, and what they come to.

    >>> accuracy = Evaluation("accuracy", (1.0, 0.5, 0.75, 0.75), diverged=0, transductive=False)
    >>> accuracy.mean, accuracy.median, round(accuracy.ci95, 3), str(accuracy)
    (0.75, 0.75, 0.2, '75.00 ± 20.00 %')
    """

    metric: Literal["accuracy", "mse"]
    """Share of the query examples classified correctly, or mean squared error."""
    values: tuple[float, ...] = field(repr=False)
    """One per episode, in their order: two evaluations on one list can be compared episode by episode."""
    diverged: int
    """Episodes whose predictions were not all finite (their accuracy counts as 0), or whose squared error was more than
    ten times the mean square of all targets."""
    transductive: bool
    """Whether the learner saw the query examples together, as :attr:`Learner.transductive` declares."""

    @property
    def n(self) -> int:
        """Number of episodes."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Over all episodes, diverged ones included: infinite if one of them is."""
        return math.fsum(self.values) / self.n

    @property
    def median(self) -> float:
        """Of the episodes' values."""
        return statistics.median(self.values)

    @property
    def ci95(self) -> float:
        """Half the width of the mean's 95 % interval over episodes, ``1.96 s / √n``; not over training seeds."""
        if self.n < 2:
            return math.nan
        if not math.isfinite(self.mean):
            return math.inf
        return 1.96 * statistics.stdev(self.values) / math.sqrt(self.n)

    def difference(self, other: Evaluation) -> tuple[float, float]:
        """How much higher this one is on the same episodes: the mean difference, and half of its 95 % interval's width.

        Of two evaluations on one list most of what makes an episode hard is in both, so that the interval of their
        difference is narrower than their own intervals suggest. Not a number, where errors are not all finite.

        Raises:
            ValueError: they are of different metrics or numbers of episodes.

        >>> ours = Evaluation("accuracy", (1.0, 0.75, 0.5), diverged=0, transductive=False)
        >>> theirs = Evaluation("accuracy", (0.75, 0.5, 0.25), diverged=0, transductive=False)
        >>> ours.difference(theirs)
        (0.25, 0.0)
        """
        if (self.metric, self.n) != (other.metric, other.n):
            raise ValueError(
                f"only evaluations on one list of episodes can be compared: this is {self.metric} of {self.n} "
                f"episodes, the other {other.metric} of {other.n}"
            )
        values = tuple(ours - theirs for ours, theirs in zip(self.values, other.values))
        if not all(map(math.isfinite, values)):
            return math.nan, math.inf
        found = Evaluation(self.metric, values, self.diverged, self.transductive)
        return found.mean, found.ci95

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return f"{100 * self.mean:.2f} ± {100 * self.ci95:.2f} %"
        return f"{self.mean:.3g} ± {self.ci95:.2g}, median {self.median:.3g}, {self.diverged} diverged"


def evaluate(learner: Learner, episodes: Episodes | EpisodeList, batch_size: int = 25) -> Evaluation:
    """Let the learner fit the support set of every episode and predict its query set.

    The learner is put into evaluation mode for the time and is left as it was. Episodes follow it to its device.

    Args:
        learner: What to judge.
        episodes: :class:`Episodes`, or a list that :meth:`EpisodeSource.frozen` gives.
        batch_size: Episodes at a time; changes speed and memory, not the result beyond rounding.

    Raises:
        TypeError: ``episodes`` is something to draw episodes from, and not a list of them.
        ValueError: there are no episodes, or targets that are not finite; or ``batch_size`` is below 1.
    """
    if not hasattr(episodes, "batches"):
        raise TypeError(
            f"evaluate takes Episodes, or a list of them as task.frozen(600) gives, got {type(episodes).__name__}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    modes = [(module, module.training) for module in learner.modules()]
    values: list[float] = []
    squares: list[float] = []
    diverged = 0
    learner.eval()
    try:
        for batch in episodes.batches(batch_size):
            batch = learner.following(batch)
            adapted = learner.fit(batch.support_x, batch.support_y, ways=batch.ways)
            with torch.no_grad():
                predicted = adapted.predict(batch.query_x)
            if batch.ways is None:
                if not bool(batch.query_y.isfinite().all()):
                    raise ValueError("targets of queries are not all finite, so that there is no error to them")
                values += _means((predicted - batch.query_y).nan_to_num(nan=math.inf).square())
                squares += _means(batch.query_y.square())
            else:
                finite = predicted.isfinite().all(-1).all(-1)
                values += _means((predicted.argmax(-1) == batch.query_y) & finite[:, None])
                diverged += int((~finite).sum())
    finally:
        for module, training in modes:
            module.training = training
    if not values:
        raise ValueError("there are no episodes to evaluate on")
    if squares:
        diverged = sum(value > 10 * statistics.fmean(squares) for value in values)
    return Evaluation("mse" if squares else "accuracy", tuple(values), diverged, learner.transductive)


def best_settings(
    learner: Learner, candidates: Iterable[dict[str, Any]], episodes: Episodes | EpisodeList
) -> dict[str, Any]:
    """The settings that give a learner the highest mean accuracy, or the lowest median error; of equals the first."""
    best, chosen = -math.inf, {}
    for settings in candidates:
        result = evaluate(learner.with_config(**settings), episodes)
        score = result.mean if result.metric == "accuracy" else -result.median
        if score > best:
            best, chosen = score, settings
    return chosen


def _means(values: Tensor) -> list[float]:
    """Over all but the axis of episodes."""
    return values.double().flatten(1).mean(1).tolist()
