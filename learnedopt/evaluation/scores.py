"""What a file of records says: who ends where, how fast, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from learnedopt.evaluation.benchmark import MULTIPLES, YARDSTICK, best_setting, find_run, find_sweep
from learnedopt.evaluation.contenders import Setting
from learnedopt.evaluation.records import Record, decode, of_kind
from learnedopt.evaluation.statistics import RESAMPLES, Estimate, Values
from learnedopt.evaluation.tasks import TASK_SETS, task_names

TAUS: Values = np.linspace(1.0, 4.0, 301)
"""Where performance profiles are evaluated, and what their score integrates over."""


@dataclass(frozen=True, order=True)
class Entry:
    """A row: a contender as it comes, or tuned for each task and horizon."""

    contender: str
    tuned: bool

    def __str__(self) -> str:
        return f"{self.contender}, tuned" if self.tuned else self.contender


OPPONENTS = (Entry("adam", False), Entry("adamw-cosine", False), Entry("adam", True), Entry("adamw-cosine", True))
"""Whom everybody is compared with."""


@dataclass(frozen=True)
class Comparison:
    """One entry's losses compared with another's, over tasks."""

    better: int
    """Tasks of lower median loss."""
    tasks: int
    surely_better: int
    """Tasks where the paired Wilcoxon test over seeds says better with p < 0.05, two-sided and not corrected."""
    surely_worse: int
    p: float
    """Of the paired Wilcoxon test over tasks, on the logarithm of the ratio of medians. Tasks where one is negative are
    left out; 1 for fewer than two."""


class Runs:
    """The records of one horizon and one number of reporting seeds: what was measured.

    Args:
        records: What :func:`learnedopt.evaluation.records.read` gave.
        tasks: Names of sets or tasks, all that occur if there are none.

    Raises:
        ValueError: there are no runs, or runs that cannot be compared: of different horizons or numbers of
            seeds, or with different starts on the same task.
    """

    def __init__(self, records: Sequence[Record], tasks: Sequence[str] | None = None) -> None:
        if tasks is None:
            tasks = [*TASK_SETS, *(record["task"] for record in of_kind(records, "run") if ":" in record["task"])]
        wanted = task_names(tasks)
        self.records = [record for record in records if record.get("task") in (None, *wanted)]
        runs = of_kind(self.records, "run")
        if not runs:
            raise ValueError("there are no runs to report on: run `learnedopt benchmark run` first")
        kinds = {(record["horizon"], record["seeds"]["copies"]) for record in runs}
        if len(kinds) > 1:
            raise ValueError(
                f"runs of different horizons or numbers of seeds cannot be compared, got {sorted(kinds)}: "
                "give each a file of its own"
            )
        self.horizon, self.seeds = kinds.pop()
        # The last identity of a contender is the one that counts: the file may hold older weights of a folder.
        self._identity = {record["contender"]: record["identity"] for record in runs}
        self._learned = {record["contender"]: record["learned"] for record in runs}
        self.tasks = [name for name in wanted if any(record["task"] == name for record in runs)]
        self._about: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            if record["kind"] in ("run", "sweep", "cost") and record["identity"] == self._identity.get(
                record["contender"]
            ):
                self._about.setdefault((record["task"], record["contender"]), []).append(record)
        for task in self.tasks:
            starts = np.array(
                [
                    decode(record["losses"])[:, 0]
                    for (name, _), found in self._about.items()
                    if name == task
                    for record in of_kind(found, "run")
                ]
            )
            if not np.allclose(starts, starts[0], rtol=1e-3):
                raise ValueError(f"runs on {task!r} start from different losses: they are not paired")

    @cached_property
    def contenders(self) -> list[str]:
        """Learned ones first, then in the order of the file."""
        return sorted(self._identity, key=lambda name: not self._learned[name])

    @cached_property
    def entries(self) -> list[Entry]:
        """Every contender as it comes and, where it was swept, tuned."""
        swept = {contender for (_, contender), found in self._about.items() if of_kind(found, "sweep")}
        return [Entry(name, tuned) for name in self.contenders for tuned in (False, True) if not tuned or name in swept]

    @cached_property
    def horizons(self) -> list[int]:
        """Those of :data:`~learnedopt.evaluation.benchmark.MULTIPLES` at which anything was run, in steps."""
        steps = [record["steps"] for record in of_kind(self.records, "run")]
        return [self.horizon * multiple for multiple in MULTIPLES if max(steps) >= self.horizon * multiple]

    def is_learned(self, entry: Entry) -> bool:
        return bool(self._learned[entry.contender])

    def setting(self, task: str, entry: Entry, horizon: int) -> Setting | None:
        """What an entry means on a task: its default, or the best of its sweep; ``None`` if there is none."""
        found = self._about.get((task, entry.contender), [])
        if not found:
            return None
        if not entry.tuned:
            return Setting(**found[-1]["default"])
        sweep = self.sweep(task, entry.contender, horizon)
        return None if sweep is None else best_setting(sweep, horizon)

    def sweep(self, task: str, contender: str, horizon: int) -> Record | None:
        """The sweep that a contender is tuned by at a horizon."""
        for record in reversed(of_kind(self._about.get((task, contender), []), "sweep")):
            serves = find_sweep([record], record["seeds"]["copies"], self.horizon, horizon, bool(record["anytime"]))
            if serves is not None and horizon in record["at"]:
                return record
        return None

    def run(self, task: str, entry: Entry, horizon: int) -> Record | None:
        """The run of an entry that is judged at a horizon."""
        setting = self.setting(task, entry, horizon)
        found = self._about.get((task, entry.contender), [])
        if setting is None:
            return None
        return find_run(found, setting, self.seeds, self.horizon, horizon, bool(found[-1]["anytime"]))

    def complete(self, entry: Entry, horizon: int) -> bool:
        """Whether an entry has runs on all tasks."""
        return all(self.run(task, entry, horizon) is not None for task in self.tasks)

    def final(self, task: str, entry: Entry, horizon: int) -> Values | None:
        """Smoothed training losses at a horizon, one per seed; infinite where a run diverged."""
        record = self.run(task, entry, horizon)
        return None if record is None else decode(record["losses"])[:, record["at"].index(horizon)]

    def best(self, task: str, entry: Entry, horizon: int) -> Values | None:
        """The lowest smoothed training losses up to a horizon; infinite where a run diverged by then."""
        record = self.run(task, entry, horizon)
        if record is None:
            return None
        losses = decode(record["losses"])[:, : record["at"].index(horizon) + 1]
        return np.where(np.isinf(losses[:, -1]), np.inf, losses.min(1))

    def held_out(self, task: str, entry: Entry, horizon: int) -> Values | None:
        """Losses on the validation split at a horizon."""
        return self._measured(task, entry, horizon, "held_out")

    def accuracy(self, task: str, entry: Entry, horizon: int) -> Values | None:
        """Accuracies on the validation split at a horizon, where the task classifies."""
        return self._measured(task, entry, horizon, "accuracy")

    def _measured(self, task: str, entry: Entry, horizon: int, key: str) -> Values | None:
        record = self.run(task, entry, horizon)
        if record is None or record[key] is None:
            return None
        return decode(record[key])[:, record["held_out_at"].index(horizon)]

    def diverged(self, entry: Entry, horizon: int) -> int:
        """Runs that diverged up to a horizon, over all tasks and seeds."""
        finals = [self.final(task, entry, horizon) for task in self.tasks]
        return sum(int(np.isinf(values).sum()) for values in finals if values is not None)

    def cost(self, task: str, contender: str) -> tuple[float, float] | None:
        """Milliseconds of a step: of the gradient, and of the optimizer."""
        found = of_kind(self._about.get((task, contender), []), "cost")
        return (found[-1]["gradient_ms"], found[-1]["optimizer_ms"]) if found else None


class Results(Runs):
    """What :class:`Runs` say, of the same arguments: speed-ups, times to a target, comparisons."""

    def envelope(self, task: str) -> tuple[Values, Values] | None:
        """The lower envelope of Adam over learning rates: steps, and the lowest loss reached by then."""
        sweeps = [record for record in of_kind(self._about.get((task, YARDSTICK), []), "sweep") if "curves" in record]
        if not sweeps:
            return None
        longest = max(reversed(sweeps), key=lambda record: record["steps"])  # of equal ones the last, as in `sweep`
        lowest = decode(longest["curves"]).min(0)
        return np.array(longest["curves_at"], dtype=np.float64), np.minimum.accumulate(lowest)

    def speedup(self, task: str, entry: Entry, horizon: int) -> Values | None:
        """VeLO's normalized speed-up, one per seed: :func:`steps_needed` by Adam over the steps taken.

        Where Adam never gets there, as many as it was given: a lower bound (:meth:`speedup_limit`). Zero where the run
        diverged.

        Source: Metz et al., *VeLO*, 2022 (arXiv:2211.09760, section 4.2).
        """
        final, envelope = self.final(task, entry, horizon), self.envelope(task)
        if final is None or envelope is None:
            return None
        steps, lowest = envelope
        return np.array([min(steps_needed(steps, lowest, loss), steps[-1]) / horizon for loss in final])

    def speedup_limit(self, task: str, horizon: int) -> float:
        """The largest speed-up that can be told apart at a horizon."""
        envelope = self.envelope(task)
        return math.nan if envelope is None else envelope[0][-1] / horizon

    def target(self, task: str, horizon: int, held_out: bool = False) -> float | None:
        """What is to be reached: the median loss of tuned Adam after three quarters of the horizon.

        For held-out losses, the lowest it has up to the horizon, median over seeds, and 2 % more.
        """
        record = self.run(task, Entry(YARDSTICK, tuned=True), horizon)
        if record is None:
            return None
        if held_out:
            until = record["held_out_at"].index(horizon) + 1
            lowest = float(np.median(decode(record["held_out"])[:, :until].min(1)))
            return (1.02 if lowest > 0 else 0.98) * lowest
        place = int(np.searchsorted(record["at"], 0.75 * horizon))
        return float(np.median(decode(record["losses"])[:, place]))

    def steps_to_target(self, task: str, entry: Entry, horizon: int, held_out: bool = False) -> Values | None:
        """Steps to the target, one per seed; infinite where the run does not reach it, or diverges, by the horizon."""
        record, target = self.run(task, entry, horizon), self.target(task, horizon, held_out)
        if record is None or target is None:
            return None
        at, losses = (record["held_out_at"], record["held_out"]) if held_out else (record["at"], record["losses"])
        until = at.index(horizon) + 1
        steps = np.array(at[:until], dtype=np.float64)
        rows = decode(losses)[:, :until]
        return np.array([steps_needed(steps, row, target) if np.isfinite(row[-1]) else math.inf for row in rows])

    def seconds_to_target(self, task: str, entry: Entry, horizon: int, held_out: bool = False) -> Values | None:
        """As :meth:`steps_to_target`, times what a step costs."""
        steps, cost = self.steps_to_target(task, entry, horizon, held_out), self.cost(task, entry.contender)
        return None if steps is None or cost is None else steps * sum(cost) / 1000

    def compare(self, ours: Entry, theirs: Entry, horizon: int) -> Comparison | None:
        """Final losses of one entry compared with another's; ``None`` if they share no task."""
        pairs = [(self.final(task, ours, horizon), self.final(task, theirs, horizon)) for task in self.tasks]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not both:
            return None
        medians = [(float(np.median(a)), float(np.median(b))) for a, b in both]
        tests = [paired_test(a, b) for a, b in both]
        ratios = np.array([_log_ratio(a, b) for a, b in medians if min(a, b) >= 0])
        return Comparison(
            better=sum(a < b for a, b in medians),
            tasks=len(both),
            surely_better=sum(p < 0.05 and a < b for p, (a, b) in zip(tests, medians)),
            surely_worse=sum(p < 0.05 and a > b for p, (a, b) in zip(tests, medians)),
            p=paired_test(ratios, np.zeros(len(ratios))) if len(ratios) > 1 else 1.0,
        )

    def mean_speedup(self, entry: Entry, horizon: int) -> Estimate | None:
        """The interquartile mean over tasks of the median speed-up over seeds, with a 95 % bootstrap interval.

        Tasks are drawn with replacement, and of each its seeds. ``None`` unless there are runs on all tasks.
        """
        values = [self.speedup(task, entry, horizon) for task in self.tasks]
        if any(value is None for value in values):
            return None
        return bootstrap_tasks(np.stack([value for value in values if value is not None]))

    def profile(self, entries: Sequence[Entry], horizon: int, of: str = "steps", held_out: bool = False) -> Values:
        """AlgoPerf's performance profile, ``(entries, len(TAUS))``: :func:`performance_profile` of times to target."""
        measure = self.steps_to_target if of == "steps" else self.seconds_to_target

        def median(task: str, entry: Entry) -> float:
            values = measure(task, entry, horizon, held_out)
            return math.inf if values is None else float(np.median(values))

        times = np.array([[median(task, entry) for task in self.tasks] for entry in entries])
        return performance_profile(times)


def steps_needed(steps: Values, losses: Values, loss: float) -> float:
    """When a curve first comes down to ``loss``, interpolated between measurements; infinite if never.

    >>> steps_needed(np.array([0.0, 10.0, 20.0]), np.array([3.0, 1.0, 0.5]), 2.0)
    5.0
    """
    if not math.isfinite(loss):
        return 0.0
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return math.inf
    place = int(reached[0])
    if place == 0 or not math.isfinite(losses[place - 1]):
        return float(steps[place])
    before, after = losses[place - 1], losses[place]
    share = (before - loss) / (before - after)
    return float(steps[place - 1] + share * (steps[place] - steps[place - 1]))


def interquartile_mean(values: Values) -> Values:
    """Mean of the middle half of the last axis, the quarters cut off in proportion.

    Source: Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*, 2021
    (arXiv:2108.13264).

    >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])))
    1.5
    """
    count = values.shape[-1]
    ordered = np.sort(values, axis=-1)
    upper = np.minimum(np.arange(1, count + 1), 0.75 * count)
    weights = np.clip(upper - np.maximum(np.arange(count), 0.25 * count), 0, 1)
    # Those of weight zero may be infinite.
    kept = weights > 0
    return np.asarray((ordered[..., kept] * weights[kept]).sum(-1) / weights.sum())


def bootstrap_tasks(values: Values, seed: int = 0) -> Estimate:
    """The interquartile mean over tasks of medians over seeds, from ``(tasks, seeds)``, and its 95 % interval."""
    tasks, seeds = values.shape
    generator = np.random.default_rng(seed)
    drawn = values[np.arange(tasks)[:, None], generator.integers(seeds, size=(RESAMPLES, tasks, seeds))]
    medians = np.median(drawn, axis=-1)
    resampled = np.take_along_axis(medians, generator.integers(tasks, size=(RESAMPLES, tasks)), axis=1)
    low, high = np.quantile(interquartile_mean(resampled), [0.025, 0.975], method="inverted_cdf")
    return Estimate(float(interquartile_mean(np.median(values, axis=-1))), float(low), float(high))


def performance_profile(times: Values) -> Values:
    """The share of tasks on which an entry takes at most τ times as long as the fastest, for τ in :data:`TAUS`.

    A task that nobody finishes counts for nobody.

    Args:
        times: ``(entries, tasks)``, infinite where the target is not reached.

    Source: Dahl et al., *Benchmarking Neural Network Training Algorithms*, 2023 (arXiv:2306.07179, section 4.3).

    >>> performance_profile(np.array([[1.0, 8.0], [2.0, 2.0]]))[:, [0, 100]]
    array([[0.5, 0.5],
           [0.5, 1. ]])
    """
    fastest = times.min(0)
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isfinite(times), times / np.maximum(fastest, np.finfo(np.float64).tiny), np.inf)
    return np.asarray((ratios[..., None] <= TAUS).mean(1))


def profile_score(profile: Values) -> Values:
    """The mean of a profile over τ from 1 to 4: one number for each entry."""
    return np.asarray(np.trapezoid(profile, TAUS, axis=-1) / (TAUS[-1] - TAUS[0]))


def paired_test(ours: Values, theirs: Values) -> float:
    """The two-sided p of Wilcoxon's signed-rank test of paired losses; 1 if no pair differs.

    An infinite loss ranks above every finite one, two infinite ones as equal. Raises ``ImportError`` without scipy.

    >>> round(paired_test(np.arange(10.0), np.arange(10.0) + 1), 4)
    0.002
    """
    try:
        from scipy.stats import wilcoxon
    except ImportError as error:
        raise ImportError("paired tests need scipy: pip install 'learnedopt[bench]'") from error
    with np.errstate(invalid="ignore"):
        differences = np.where(np.isinf(ours) & np.isinf(theirs), 0.0, ours - theirs)
    finite = np.abs(differences[np.isfinite(differences)]).max(initial=0.0)
    differences = np.clip(differences, -2 * finite - 1, 2 * finite + 1)
    if not differences.any():
        return 1.0
    # Exact where it can be: ties and zeros leave the normal approximation.
    return float(wilcoxon(differences).pvalue)


def _log_ratio(ours: float, theirs: float) -> float:
    if math.isinf(ours) or math.isinf(theirs):
        return 0.0 if ours == theirs else math.copysign(math.inf, ours - theirs)
    tiny = np.finfo(np.float64).tiny
    return math.log(max(ours, tiny) / max(theirs, tiny))


def losses_of(results: Results, ours: Entry, theirs: Entry, horizon: int) -> Iterator[tuple[str, float | None]]:
    """The tasks on which ``ours`` ends above ``theirs``, and by what factor of the median loss if none is negative;
    infinite where half of the runs have diverged."""
    for task in results.tasks:
        a, b = results.final(task, ours, horizon), results.final(task, theirs, horizon)
        if a is not None and b is not None and np.median(a) > np.median(b):
            medians = float(np.median(a)), float(np.median(b))
            if math.isinf(medians[0]):
                yield task, math.inf
            else:
                yield task, math.exp(min(_log_ratio(*medians), 700.0)) if min(medians) >= 0 else None
