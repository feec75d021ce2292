"""The tables of the benchmark's report."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from learnedopt.evaluation.scores import OPPONENTS, Comparison, Entry, Results, profile_score
from learnedopt.evaluation.statistics import Estimate, Values


@dataclass(frozen=True)
class Table:
    """Text in rows; the first cell of each row names it."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.header) + " |", "|---|" + "--:|" * (len(self.header) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return f"### {self.title}\n\n{self.note}\n\n" + "\n".join(lines) + "\n"

    def html(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{marked(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            f"<h3>{html.escape(self.title)}</h3><p>{html.escape(self.note)}</p>"
            f'<div class="wide"><table>{row(self.header, "th")}{body}</table></div>'
        )


def summary_of(results: Results, horizon: int) -> Table:
    """A row for every entry that was run at a horizon."""
    opponents = [entry for entry in OPPONENTS if entry in results.entries]
    header = ["optimizer", "tasks", "speed-up, IQM [95 %]", "diverged runs"]
    header += [f"better than {entry}" for entry in opponents]
    header += ["profile, steps", "profile, seconds", "profile, held-out"]
    entries = [entry for entry in results.entries if _count(results, entry, horizon)]
    whole = [entry for entry in entries if results.complete(entry, horizon)]
    scores = {}
    for column, (of, held_out) in enumerate((("steps", False), ("seconds", False), ("steps", True))):
        if all(results.target(task, horizon, held_out) is None for task in results.tasks):
            continue
        for entry, score in zip(whole, profile_score(results.profile(whole, horizon, of, held_out)) if whole else []):
            scores[entry, column] = f"{score:.2f}"
    rows = []
    for entry in entries:
        row = [_name(results, entry), f"{_count(results, entry, horizon)} of {len(results.tasks)}"]
        row += [_interval(results.mean_speedup(entry, horizon)), str(results.diverged(entry, horizon))]
        row += [_verdict(results.compare(entry, other, horizon)) if entry != other else "" for other in opponents]
        rows.append((*row, *(scores.get((entry, column), "") for column in range(3))))
    note = (
        "Better: tasks of lower median final training loss, in brackets those where a paired Wilcoxon test over seeds "
        "says better / worse with p < 0.05. Profile: mean share of tasks on which the target is reached within τ times "
        "the fastest time, τ from 1 to 4. Learned rules in bold."
    )
    return Table(f"Summary at {horizon} steps", note, tuple(header), tuple(rows))


def tables_of(results: Results, horizon: int) -> Iterator[Table]:
    """Task by task at a horizon: losses, speed-ups, targets, settings."""
    entries = [entry for entry in results.entries if _count(results, entry, horizon)]
    header = ("task", *(_name(results, entry) for entry in entries))

    def table(title: str, note: str, cell: Callable[[str, Entry], tuple[str, float]], lowest: bool = True) -> Table:
        rows = []
        for task in results.tasks:
            cells = [cell(task, entry) for entry in entries]
            values = [value for _, value in cells if not math.isnan(value)]
            best = (min(values) if lowest else max(values)) if values else math.nan
            rows.append(
                (task, *(f"**{text}**" if value == best and math.isfinite(best) else text for text, value in cells))
            )
        return Table(f"{title} at {horizon} steps", note, header, tuple(rows))

    def losses(values: Values | None) -> tuple[str, float]:
        if values is None:
            return "", math.nan
        failed = int(np.isinf(values).sum())
        median = float(np.median(values))
        return _number(median) + (f" ({failed} div.)" if failed else ""), median

    yield table(
        "Final training loss",
        "Median over seeds; how many diverged, if any. The lowest of a row in bold.",
        lambda task, entry: losses(results.final(task, entry, horizon)),
    )
    yield table(
        "Lowest training loss",
        "The lowest up to the horizon, median over seeds.",
        lambda task, entry: losses(results.best(task, entry, horizon)),
    )
    yield table(
        "Held-out loss",
        "At the horizon, on the validation split; median over seeds.",
        lambda task, entry: losses(results.held_out(task, entry, horizon)),
    )
    yield table(
        "Held-out accuracy",
        "At the horizon, where the task classifies; median over seeds.",
        lambda task, entry: _median(results.accuracy(task, entry, horizon), "{:.3f}"),
        lowest=False,
    )

    def speedup(task: str, entry: Entry) -> tuple[str, float]:
        text, value = _median(results.speedup(task, entry, horizon), "{:.2f}")
        limited = value >= results.speedup_limit(task, horizon)
        return ("≥ " if limited else "") + text, value

    yield table(
        "Speed-up over lr-tuned Adam",
        "Steps that the lower envelope of Adam over learning rates needs for the final loss, over the steps taken; "
        "median over seeds. ≥: Adam was not run for long enough to get there.",
        speedup,
        lowest=False,
    )
    yield table(
        "Steps to the target",
        "The median loss of tuned Adam after three quarters of the horizon; ∞: not reached by the horizon by half of "
        "the seeds.",
        lambda task, entry: _median(results.steps_to_target(task, entry, horizon), "{:.0f}"),
    )
    yield table(
        "Seconds to the target",
        "Those steps times the processor time of a step of one model on one thread.",
        lambda task, entry: _median(results.seconds_to_target(task, entry, horizon), "{:.3g}"),
    )

    def setting(task: str, entry: Entry) -> tuple[str, float]:
        found = results.setting(task, entry, horizon)
        if found is None:
            return "", math.nan
        sweep = results.sweep(task, entry.contender, horizon) if entry.tuned else None
        rates = [one["lr"] for one in sweep["settings"]] if sweep is not None else []
        edge = " (edge)" if rates and found.lr in (min(rates), max(rates)) else ""
        decay = "" if found.weight_decay is None else f", wd {found.weight_decay:g}"
        return f"{found.lr:g}{decay}{edge}", math.nan

    yield table(
        "Settings",
        "Learning rate (of a learned rule, the multiplier of its update) and weight decay. Edge: the best is the "
        "smallest or largest tried, so that a better one may lie outside.",
        setting,
    )


def _name(results: Results, entry: Entry) -> str:
    return f"**{entry}**" if results.is_learned(entry) else str(entry)


def _count(results: Results, entry: Entry, horizon: int) -> int:
    return sum(results.run(task, entry, horizon) is not None for task in results.tasks)


def _median(values: Values | None, form: str) -> tuple[str, float]:
    if values is None:
        return "", math.nan
    median = float(np.median(values))
    return (form.format(median) if math.isfinite(median) else "∞"), median


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _verdict(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    sure = f"({comparison.surely_better} / {comparison.surely_worse})"
    return f"{comparison.better} of {comparison.tasks} {sure}"


def marked(text: str) -> str:
    """Escaped, with ``**bold**``, ``*emphasis*`` and `code` of Markdown as HTML."""
    escaped = html.escape(text)
    for mark, tag in (("**", "b"), ("`", "code"), ("*", "i")):
        pieces = escaped.split(mark)
        # Marks come in pairs; a single one is itself.
        if len(pieces) % 2:
            escaped = "".join(f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces))
    return escaped
