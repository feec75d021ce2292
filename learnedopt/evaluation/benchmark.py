"""Running the optimizer benchmark: contenders × tasks × seeds × horizons, into a file of records.

For each task and contender there is

* a *sweep*: every setting of its grid on the selection seeds, in one vectorized run. First all learning rates at the
  default weight decay; then, where it has weight decay, the other decays at the best learning rate and its two
  neighbors. The best has the lowest smoothed training loss at the horizon, averaged over the selection seeds;
* a *run* of its default, and of the best setting for each horizon, on the reporting seeds;
* a *cost*: processor time of a training step.

A contender that does not know how long it will run is run once, at the longest horizon, and judged at each on the way;
one with a schedule is swept and run for every horizon. Adam is swept for longer, since its lower envelope over learning
rates is the yardstick of the normalized speed-up.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from learnedopt.evaluation import records
from learnedopt.evaluation.contenders import Contender, Setting, find_contender
from learnedopt.evaluation.measurement import Measurements, Problems, step_cost, train
from learnedopt.evaluation.records import Record, decode, encode
from learnedopt.evaluation.tasks import BenchmarkTask, find_tasks
from learnedopt.runs import source_commit

YARDSTICK = "adam"
"""Whose envelope over learning rates the normalized speed-up is measured by."""
MULTIPLES = (1, 2, 5, 10)
"""Of the horizon, at which results can be judged."""
Tuning = Literal["all", "none"]


@dataclass(frozen=True)
class Plan:
    """How the benchmark measures. Results of plans that differ in seeds or horizon do not mix."""

    horizon: int = 500
    """Steps that count as 1×."""
    multiples: tuple[int, ...] = (1,)
    """Of the horizon, at which runs are judged; some of :data:`MULTIPLES`."""
    selection_seeds: int = 2
    reporting_seeds: int = 10
    tuning: Tuning = "all"
    """``"none"`` runs defaults only."""
    yardstick_multiple: int = 4
    """Adam is swept for so many horizons, or twice the longest if that is more."""
    root: Path | None = None
    """Folder of downloaded data."""

    def __post_init__(self) -> None:
        if self.horizon < 10 or self.horizon % self.every or min(self.selection_seeds, self.reporting_seeds) < 1:
            raise ValueError(
                "a benchmark needs a horizon of at least 10 steps, from 100 on a multiple of its fiftieth, and at "
                f"least one seed of either kind; got {self.horizon}, {self.selection_seeds}, {self.reporting_seeds}"
            )
        if not self.multiples or not set(self.multiples) <= set(MULTIPLES):
            raise ValueError(
                f"multiples of the horizon must be some of {', '.join(map(str, MULTIPLES))}, got {self.multiples}"
            )

    @property
    def every(self) -> int:
        """Steps between two measurements."""
        return max(1, self.horizon // 50)

    @property
    def horizons(self) -> tuple[int, ...]:
        """In steps, ascending."""
        return tuple(self.horizon * multiple for multiple in sorted(set(self.multiples)))


def kept(at: Sequence[int], horizon: int) -> list[int]:
    """The places in ``at`` that a file keeps of a curve: 5 % apart, and every multiple of the horizon.

    >>> at = range(0, 201, 10)
    >>> [at[place] for place in kept(at, 100)]
    [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 200]
    """
    places, following = [], 0.0
    for place, step in enumerate(at):
        if step >= following or step % horizon == 0 or place == len(at) - 1:
            places.append(place)
            following = max(1.05 * step, step + 1)
    return places


@dataclass(frozen=True)
class Benchmark:
    """A plan, what it is carried out on, and the file that results go to.

    What the file already holds is not run again, so that a benchmark may be stopped and continued, extended by
    contenders, tasks and multiples of the horizon, or spread over invocations.
    """

    path: Path
    tasks: Sequence[str]
    """Names of sets or tasks."""
    contenders: Sequence[str]
    plan: Plan = field(default_factory=Plan)
    command: str = ""

    def run(self, processes: int = 1) -> Generator[str, None, None]:
        """Run what is missing; yields a line about everything that finished.

        Raises ``ValueError`` for an unknown task or contender, and for a file that holds runs of another horizon or
        number of seeds, before anything runs.
        """
        tasks = find_tasks(self.tasks)
        done = _Done(records.read(self.path) if self.path.exists() else [])
        for record in done.of_kind("run"):
            theirs, ours = (
                (record["horizon"], record["seeds"]["copies"]),
                (self.plan.horizon, self.plan.reporting_seeds),
            )
            if theirs != ours:
                raise ValueError(
                    f"{self.path} holds runs with a horizon of {theirs[0]} steps on {theirs[1]} seed(s), which cannot "
                    f"stand beside {ours[0]} steps and {ours[1]} seed(s): give these a file of their own"
                )
        contenders = []
        for name in self.contenders:
            try:
                contenders.append(find_contender(name))
            except ImportError as error:
                yield from self._keep(done, [{"kind": "skip", "contender": name, "task": None, "reason": str(error)}])
        session = _session(self.command)
        if not any(record["id"] == session["id"] for record in done.of_kind("session")):
            yield from self._keep(done, [session])
        jobs = []
        for task in tasks:
            try:
                task.family(self.plan.root)
            except ValueError as error:
                skip = {"kind": "skip", "contender": None, "task": task.name, "reason": str(error)}
                yield from self._keep(done, [skip])
                continue
            jobs += [(task.name, contender.name) for contender in contenders]
        if processes == 1:
            for task_name, name in jobs:
                yield from self._keep(done, perform(task_name, name, self.plan, session["id"], done))
            return
        # Records are kept here, in the parent, so that no two processes write.
        with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            work = partial(_performed, plan=self.plan, session=session["id"])
            futures = [pool.submit(work, *job, have=done.about(*job)) for job in jobs]
            for future in as_completed(futures):
                yield from self._keep(done, future.result())

    def _keep(self, done: _Done, found: Iterator[Record] | list[Record]) -> Iterator[str]:
        for record in found:
            if record["kind"] != "skip" or record not in done.records:
                records.append(self.path, record)
                done.records.append(record)
            if (line := _line(record)) is not None:
                yield line


class _Done:
    """What the file holds."""

    def __init__(self, found: list[Record]) -> None:
        self.records = found

    def of_kind(self, kind: str) -> list[Record]:
        return records.of_kind(self.records, kind)

    def about(self, task: str, contender: str) -> list[Record]:
        return [record for record in self.records if (record.get("task"), record.get("contender")) == (task, contender)]


def perform(task_name: str, contender_name: str, plan: Plan, session: str, done: _Done) -> Iterator[Record]:
    """Run what is missing of one contender on one task."""
    (task,), contender = find_tasks([task_name]), find_contender(contender_name)
    have = [record for record in done.about(task_name, contender.name) if record["identity"] == contender.identity]
    runner = _Runner(task, contender, plan, session)
    if not records.of_kind(have, "cost"):
        yield runner.cost()
    settings: dict[int, list[Setting]] = {horizon: [contender.default] for horizon in plan.horizons}
    if plan.tuning == "all":
        lengths = (max(plan.horizons),) if contender.anytime else plan.horizons
        for length in lengths:
            steps = length
            if contender.name == YARDSTICK:
                steps = max(2 * length, plan.yardstick_multiple * plan.horizon)
            sweep = find_sweep(have, plan.selection_seeds, plan.horizon, steps, contender.anytime)
            if sweep is None:
                sweep = runner.sweep(steps, plan.horizons if contender.anytime else (length,))
                yield sweep
            for horizon in plan.horizons if contender.anytime else (length,):
                settings[horizon].append(best_setting(sweep, horizon))
    for steps, wanted in _runs(settings, contender.anytime):
        missing = [
            setting
            for setting in wanted
            if find_run(have, setting, plan.reporting_seeds, plan.horizon, steps, contender.anytime) is None
        ]
        yield from runner.runs(missing, steps)


def _performed(task: str, contender: str, *, plan: Plan, session: str, have: list[Record]) -> list[Record]:
    """:func:`perform`, in another process."""
    return list(perform(task, contender, plan, session, _Done(have)))


def _runs(settings: dict[int, list[Setting]], anytime: bool) -> Iterator[tuple[int, list[Setting]]]:
    """Which settings to run for how long, no setting twice: an anytime contender's for as long as any needs it."""
    if anytime:
        longest = max(settings)
        yield longest, list(dict.fromkeys(setting for some in settings.values() for setting in some))
        return
    for horizon, some in settings.items():
        yield horizon, list(dict.fromkeys(some))


def _seeds(record: Record, role: str, copies: int, horizon: int) -> bool:
    return bool(record["seeds"] == {"role": role, "copies": copies} and record["horizon"] == horizon)


def find_sweep(have: Sequence[Record], copies: int, horizon: int, steps: int, anytime: bool) -> Record | None:
    """The last sweep that serves for ``steps``, if there is one."""
    for record in reversed(records.of_kind(have, "sweep")):
        long_enough = record["steps"] >= steps if anytime else record["steps"] == steps
        if _seeds(record, "selection", copies, horizon) and long_enough:
            return record
    return None


def find_run(
    have: Sequence[Record], setting: Setting, copies: int, horizon: int, steps: int, anytime: bool
) -> Record | None:
    """The last run of a setting that serves for ``steps``, if there is one."""
    wanted = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    for record in reversed(records.of_kind(have, "run")):
        long_enough = record["steps"] >= steps if anytime else record["steps"] == steps
        if record["setting"] == wanted and _seeds(record, "reporting", copies, horizon) and long_enough:
            return record
    return None


def best_setting(sweep: Record, horizon: int) -> Setting:
    """The setting of the lowest mean smoothed loss at a horizon; of equal ones the first."""
    place = sweep["at"].index(horizon)
    scores = decode(sweep["final"])[:, place].mean(-1)
    return Setting(**sweep["settings"][int(np.argmin(scores))])


class _Runner:
    """One contender on one task."""

    def __init__(self, task: BenchmarkTask, contender: Contender, plan: Plan, session: str) -> None:
        self._contender, self._plan = contender, plan
        self._family, self._shared = task.family(plan.root), task.shared
        self._common = {
            "task": task.name,
            "contender": contender.name,
            "identity": contender.identity,
            "learned": contender.learned,
            "anytime": contender.anytime,
            "default": vars(contender.default),
            "horizon": plan.horizon,
            "session": session,
        }

    def cost(self) -> Record:
        cost = step_cost(self._family, self._contender)
        return {
            "kind": "cost",
            **self._common,
            "gradient_ms": encode(cost.gradient),
            "optimizer_ms": encode(cost.optimizer),
        }

    def sweep(self, steps: int, horizons: Sequence[int]) -> Record:
        contender = self._contender
        settings = [Setting(rate, contender.default.weight_decay) for rate in contender.rates]
        first = self._train(settings, steps, _SELECTION, self._plan.selection_seeds)
        at = sorted({*horizons, *range(self._plan.horizon, steps + 1, self._plan.horizon), steps})
        places = [first.at.index(step) for step in at]
        final = first.losses[places]
        if contender.decays:
            # At the best rate for any of the horizons, and beside it.
            near = {
                place
                for horizon in horizons
                for place in _beside(int(np.argmin(final[at.index(horizon)].mean(-1))), len(settings))
            }
            more = [Setting(contender.rates[place], decay) for decay in contender.decays for place in sorted(near)]
            second = self._train(more, steps, _SELECTION, self._plan.selection_seeds)
            final = np.concatenate([final, second.losses[places]], axis=1)
            settings += more
        record = {
            "kind": "sweep",
            **self._common,
            "steps": steps,
            "seeds": {"role": "selection", "copies": self._plan.selection_seeds},
            "settings": [vars(setting) for setting in settings],
            "at": at,
            "final": encode(final.transpose(1, 0, 2)),
        }
        if contender.name == YARDSTICK:
            places = kept(first.at, self._plan.horizon)
            record["curves_at"] = [first.at[place] for place in places]
            record["curves"] = encode(first.losses[places].mean(-1).T)
        return record

    def runs(self, settings: Sequence[Setting], steps: int) -> Iterator[Record]:
        if not settings:
            return
        measured = self._train(settings, steps, _REPORTING, self._plan.reporting_seeds, held_out=True)
        places = kept(measured.at, self._plan.horizon)
        for index, setting in enumerate(settings):
            accuracy = None if measured.accuracy is None else encode(measured.accuracy[:, index].T, 4)
            yield {
                "kind": "run",
                **self._common,
                "setting": vars(setting),
                "steps": steps,
                "seeds": {"role": "reporting", "copies": self._plan.reporting_seeds},
                "parameters": measured.parameters,
                "diverged": [None if step < 0 else int(step) for step in measured.diverged[index]],
                "at": [measured.at[place] for place in places],
                "losses": encode(measured.losses[places, index].T),
                "held_out_at": list(measured.held_out_at),
                "held_out": encode(measured.held_out[:, index].T, 4),
                "accuracy": accuracy,
            }

    def _train(
        self, settings: Sequence[Setting], steps: int, seed: int, copies: int, held_out: bool = False
    ) -> Measurements:
        every, horizon = self._plan.every, self._plan.horizon
        return train(
            Problems(self._family, seed, copies, self._shared),
            self._contender,
            settings,
            steps,
            every=every,
            held_out_at=(*range(0, steps + 1, 5 * every), *range(0, steps + 1, horizon)) if held_out else (),
        )


_SELECTION, _REPORTING = 1000, 2000
"""Seeds of the generators from which problems, starting points and batches of either kind are drawn."""


def _beside(place: int, count: int) -> Iterator[int]:
    yield from range(max(0, place - 1), min(count, place + 2))


def _session(command: str) -> Record:
    """What produced records: those it made refer to it by its ``id``."""
    facts: dict[str, Any] = {
        "command": command,
        "learnedopt": _installed_version(),
        "commit": source_commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} thread(s)",
    }
    return {"kind": "session", "id": hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12], **facts}


def _installed_version() -> str:
    try:
        return version("learnedopt")
    except PackageNotFoundError:  # a checkout that was never installed; its commit is known
        return "unknown"


def _line(record: Record) -> str | None:
    if record["kind"] == "skip":
        return f"skipped {record['task'] or record['contender']}: {record['reason']}"
    if record["kind"] == "session":
        return None
    where = f"{record['task']:<20} {record['contender']:<16}"
    if record["kind"] == "cost":
        return f"{where} {record['gradient_ms']:.2f} ms gradient, {record['optimizer_ms']:.2f} ms optimizer"
    if record["kind"] == "sweep":
        best = best_setting(record, record["at"][-1])
        return f"{where} {len(record['settings'])} settings, {record['steps']} steps; best {_named(best)}"
    last = decode(record["losses"])[:, -1]
    failed = f", {sum(at is not None for at in record['diverged'])} diverged" if any(record["diverged"]) else ""
    return f"{where} {_named(Setting(**record['setting']))}: loss {np.median(last):.4g} at {record['steps']}{failed}"


def _named(setting: Setting) -> str:
    decay = "" if setting.weight_decay is None else f", weight decay {setting.weight_decay:g}"
    return f"lr {setting.lr:g}{decay}"
