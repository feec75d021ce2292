"""The benchmark's report: one self-contained page, its pictures, and a table, all from files of records.

Nothing else goes in, so that the same files give the same bytes (with the same version of matplotlib).
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learnedopt.evaluation.benchmark import YARDSTICK
from learnedopt.evaluation.records import decode, of_kind, read
from learnedopt.evaluation.scores import (
    TAUS,
    Comparison,
    Entry,
    Results,
    losses_of,
    profile_score,
)
from learnedopt.evaluation.statistics import Estimate, Values
from learnedopt.evaluation.tasks import TASK_SETS
from learnedopt.evaluation.tasks.sets import UNNAMED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPPONENTS = (Entry("adam", False), Entry("adamw-cosine", False), Entry("adam", True), Entry("adamw-cosine", True))
"""Whom everybody is compared with."""


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
            return "<tr>" + "".join(f"<{tag}>{_marked(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            f"<h3>{html.escape(self.title)}</h3><p>{html.escape(self.note)}</p>"
            f'<div class="wide"><table>{row(self.header, "th")}{body}</table></div>'
        )


def write_report(files: Sequence[Path], out: Path, tasks: Sequence[str] | None = None) -> str:
    """Write ``index.html``, ``report.md`` and the pictures into a folder; returns the summary as Markdown.

    Args:
        files: Of records, read one after the other as if they were one.
        out: The folder; made if need be.
        tasks: Sets or tasks to report on; all that occur without it.

    Raises:
        ValueError: there is nothing to report, or what there is cannot stand in one report
            (:class:`~learnedopt.evaluation.scores.Results`).
        ImportError: matplotlib or scipy is missing.
    """
    results = Results([record for file in files for record in read(file)], tasks)
    tables = [table for horizon in results.horizons for table in _tables(results, horizon)]
    pictures = {
        name: _png(figure) for horizon in results.horizons for name, figure in _figures(results, horizon).items()
    }
    sources = list(_sources(results, files))
    losses = [line for horizon in results.horizons for line in _losses(results, horizon)]
    summary = "\n".join(_summary(results, horizon).markdown() for horizon in results.horizons)
    markdown = [
        f"# Optimizers on {len(results.tasks)} tasks\n\n{_method(results)}\n",
        summary,
        "### Where learned rules lose\n\n" + "\n".join(f"* {line}" for line in losses) + "\n",
        *(table.markdown() for table in tables),
        "### Sources\n\n" + "\n".join(f"* {line}" for line in sources) + "\n",
    ]
    page = _page(results, tables, pictures, losses, sources)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.md", "\n".join(markdown).encode())
    for name, data in pictures.items():
        _write(out / f"{name}.png", data)
    _write(out / "index.html", page.encode())
    return summary


def _method(results: Results) -> str:
    return (
        f"Horizon 1x is {results.horizon} steps; {results.seeds} seeds, the same starts and batches for everybody, "
        "disjoint from those that settings were tuned on. Training losses are measured on fixed batches and smoothed; "
        "a run that diverges counts as infinite from there on. *Tuned* is the best of the grid for each task and "
        "horizon by the training loss. The speed-up is the number of steps that the lower envelope of Adam over "
        "fifteen learning rates needs for the loss that the row ends at, over the steps taken."
    )


def _summary(results: Results, horizon: int) -> Table:
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


def _tables(results: Results, horizon: int) -> Iterator[Table]:
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


def _by(factor: float | None) -> str:
    if factor is None:
        return ""
    return " (diverged)" if math.isinf(factor) else f" ({factor:.3g}×)"


def _losses(results: Results, horizon: int) -> Iterator[str]:
    """Where learned rules, as they come, end above whom they are compared with; in words."""
    for entry in results.entries:
        if not results.is_learned(entry) or entry.tuned:
            continue
        for other in OPPONENTS:
            comparison = results.compare(entry, other, horizon) if other in results.entries else None
            if comparison is None:
                continue
            worse = [task + _by(factor) for task, factor in losses_of(results, entry, other, horizon)]
            yield (
                f"{entry} against {other} at {horizon} steps: ends above it on {len(worse)} of {comparison.tasks}"
                + (f": {', '.join(worse)}" if worse else "")
                + f"; p = {comparison.p:.2g} over tasks"
            )


def _sources(results: Results, files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        yield f"raw file {file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    used = {record["session"] for record in results.records if "session" in record}
    for record in of_kind(results.records, "session"):
        if record["id"] in used:
            yield (
                f"`{record['command']}`: learnedopt {record['learnedopt']} at {record['commit']}, torch "
                f"{record['torch']}, Python {record['python']}, {record['machine']}"
            )
    yield f"pictures by matplotlib {_matplotlib_version()}"
    for record in of_kind(results.records, "skip"):
        if record["task"] in results.tasks or record["contender"] in results.contenders:
            continue  # it ran later
        yield f"skipped {record['task'] or record['contender']}: {record['reason']}"


def _figures(results: Results, horizon: int) -> dict[str, Figure]:
    figures = {
        "curves": _curves(results, horizon),
        "profiles": _profiles(results, horizon),
        "sensitivity": _sensitivity(results, horizon),
        "cost": _cost(results, horizon),
    }
    return {f"{name}-{horizon}": figure for name, figure in figures.items() if figure is not None}


def _grid(count: int, columns: int = 4) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for extra in axes[count:]:
        extra.remove()
    return figure, axes[:count]


def _style(results: Results, entry: Entry) -> dict[str, object]:
    """A colour for each contender, learned ones thick; whole lines as one would use it: tuned, unless it is learned."""
    return {
        "color": f"C{results.contenders.index(entry.contender) % 10}",
        "linewidth": 2.2 if results.is_learned(entry) else 1.2,
        "linestyle": "-" if entry.tuned != results.is_learned(entry) else "-." if entry.tuned else "--",
    }


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize="small")


def _curves(results: Results, horizon: int) -> Figure:
    """Training losses of everybody: the median over seeds, and its quartiles for learned rules and tuned Adam."""
    figure, panels = _grid(len(results.tasks))
    shown = [entry for entry in results.entries if entry.tuned != results.is_learned(entry) or entry in OPPONENTS[:1]]
    for task, axes in zip(results.tasks, panels):
        for entry in shown:
            record = results.run(task, entry, horizon)
            if record is None:
                continue
            until = record["at"].index(horizon) + 1
            losses = decode(record["losses"])[:, :until]
            # No interpolation: nothing lies between a finite loss and that of a diverged run.
            low, middle, high = np.quantile(losses, [0.25, 0.5, 0.75], axis=0, method="inverted_cdf")
            style = _style(results, entry)
            axes.plot(record["at"][:until], middle, label=str(entry), **style)  # type: ignore[arg-type]
            if results.is_learned(entry) or entry.contender == YARDSTICK:
                axes.fill_between(record["at"][:until], low, high, color=str(style["color"]), alpha=0.15, linewidth=0)
        axes.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
    _legend(figure, max(panels, key=lambda axes: len(axes.lines)))
    return figure


def _profiles(results: Results, horizon: int) -> Figure | None:
    entries = [entry for entry in results.entries if results.complete(entry, horizon)]
    if not entries or any(results.target(task, horizon) is None for task in results.tasks):
        return None
    figure, panels = _grid(3, columns=3)
    kinds = (("steps", False, "training loss, steps"), ("seconds", False, "training loss, seconds"))
    for axes, (of, held_out, title) in zip(panels, (*kinds, ("steps", True, "held-out loss, steps"))):
        for entry, line in zip(entries, results.profile(entries, horizon, of, held_out)):
            axes.plot(TAUS, line, label=str(entry), **_style(results, entry))  # type: ignore[arg-type]
        axes.set(title=title, xlabel="τ", ylabel="share of tasks within τ of the fastest", ylim=(-0.02, 1.02))
    _legend(figure, panels[0])
    return figure


def _sensitivity(results: Results, horizon: int) -> Figure | None:
    """The final loss over the learning rate, as a multiple of the default, at the default weight decay."""
    if not any(results.sweep(task, name, horizon) for task in results.tasks for name in results.contenders):
        return None
    figure, panels = _grid(len(results.tasks))
    for task, axes in zip(results.tasks, panels):
        for name in results.contenders:
            sweep = results.sweep(task, name, horizon)
            if sweep is None:
                continue
            default = sweep["default"]
            chosen = [
                place for place, one in enumerate(sweep["settings"]) if one["weight_decay"] == default["weight_decay"]
            ]
            rates = np.array([sweep["settings"][place]["lr"] for place in chosen]) / default["lr"]
            losses = decode(sweep["final"])[chosen][:, sweep["at"].index(horizon)].mean(-1)
            axes.plot(rates, losses, marker=".", label=name, **_style(results, Entry(name, True)))  # type: ignore[arg-type]
        axes.axvline(1.0, color="grey", linestyle=":", linewidth=1)
        axes.set(title=task, xlabel="learning rate / default", ylabel="final loss", xscale="log", yscale="log")
    _legend(figure, max(panels, key=lambda axes: len(axes.lines)))
    return figure


def _cost(results: Results, horizon: int) -> Figure | None:
    """What a step costs beside how much a step is worth."""
    points = []
    for entry in results.entries:
        speed = results.mean_speedup(entry, horizon) if results.complete(entry, horizon) else None
        costs = [results.cost(task, entry.contender) for task in results.tasks]
        if speed is not None and all(costs):
            shares = [sum(cost) / cost[0] for cost in costs if cost is not None]
            points.append((entry, float(np.exp(np.mean(np.log(shares)))), speed))
    if not points:
        return None
    figure, (axes,) = _grid(1)
    figure.set_size_inches(7, 5)
    for entry, cost, speed in points:
        # An interval by percentiles need not contain the value.
        error = np.maximum([[speed.value - speed.low], [speed.high - speed.value]], 0)
        axes.errorbar(
            [cost],
            [speed.value],
            error,
            fmt="o" if entry.tuned else "^",
            color=str(_style(results, entry)["color"]),
            label=str(entry),
        )
    axes.axhline(1.0, color="grey", linestyle=":", linewidth=1)
    axes.set(
        xlabel="time of a step, in times of its gradient (geometric mean over tasks)",
        ylabel="speed-up in steps over lr-tuned Adam (IQM)",
    )
    axes.legend(fontsize="small", ncols=2)
    return figure


_CAPTIONS = {
    "curves": "Training loss: median over seeds; band between quartiles for learned rules and Adam. Learned rules "
    "untuned, the others tuned, default Adam dashed.",
    "profiles": "Performance profiles: the share of tasks on which the target is reached within τ times the time of "
    "the fastest. Dashed: hand-written, untuned; dash-dotted: learned, tuned.",
    "sensitivity": "Sensitivity: the final training loss over the learning rate, in multiples of the default, mean "
    "over the selection seeds. A gap is a diverged run.",
    "cost": "What a step costs and what it is worth. Triangles: untuned, discs: tuned.",
}


def _page(
    results: Results, tables: Sequence[Table], pictures: dict[str, bytes], losses: Sequence[str], sources: Sequence[str]
) -> str:
    def items(lines: Iterable[str]) -> str:
        return "<ul>" + "".join(f"<li>{_marked(line)}</li>" for line in lines) + "</ul>"

    parts = [f"<h1>Optimizers on {len(results.tasks)} tasks</h1><p>{_marked(_method(results))}</p>"]
    for horizon in results.horizons:
        parts += [f"<h2>{horizon} steps</h2>", _summary(results, horizon).html()]
    parts += ["<h2>Where learned rules lose</h2>", items(losses or ["no learned rule was run"])]
    for name, data in pictures.items():
        kind, _, horizon_of = name.partition("-")
        image = base64.b64encode(data).decode()
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{image}"><figcaption>At {horizon_of} steps. '
            f"{html.escape(_CAPTIONS[kind])} Made from {_marked(', '.join(sources[:1]))}.</figcaption></figure>"
        )
    described = {task.name: (task.kind, task.distance) for tasks in TASK_SETS.values() for task in tasks}
    rows = tuple((name, *described.get(name, ("other", UNNAMED))) for name in results.tasks)
    parts.append(
        Table("Tasks", "What about each the meta-training of the default rule has not seen.", _TASK_HEADER, rows).html()
    )
    parts += [table.html() for table in tables]
    parts += ["<h2>Sources</h2>", items(sources)]
    return _PAGE.format(body="\n".join(parts))


_TASK_HEADER = ("task", "kind", "what is new")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Optimizer benchmark</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 13px; }} td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; }}
td {{ text-align: right; white-space: nowrap; }} td:first-child {{ text-align: left; }} .wide {{ overflow-x: auto; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; }} figcaption {{ color: #555; }}
</style></head><body>
{body}
</body></html>
"""


def _marked(text: str) -> str:
    """Escaped, with ``**bold**``, ``*emphasis*`` and `code` of Markdown as HTML."""
    escaped = html.escape(text)
    for mark, tag in (("**", "b"), ("`", "code"), ("*", "i")):
        pieces = escaped.split(mark)
        # Marks come in pairs; a single one is itself.
        if len(pieces) % 2:
            escaped = "".join(f"<{tag}>{piece}</{tag}>" if i % 2 else piece for i, piece in enumerate(pieces))
    return escaped


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


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    # Without the metadata that names a version, so that the bytes depend on the picture alone.
    figure.savefig(data, format="png", dpi=80, metadata={"Software": None})
    return data.getvalue()


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)


def _matplotlib_version() -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'learnedopt[bench]'") from error
    return str(matplotlib.__version__)
