"""The benchmark's report: one self-contained page, its pictures, and a table, all from files of records.

Nothing else goes in, so that the same files give the same bytes (with the same version of matplotlib).
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from learnedopt.evaluation.plots import CAPTIONS, matplotlib_version, pictures_of
from learnedopt.evaluation.records import of_kind, read
from learnedopt.evaluation.scores import OPPONENTS, Results, losses_of
from learnedopt.evaluation.tables import Table, marked, summary_of, tables_of
from learnedopt.evaluation.tasks import TASK_SETS
from learnedopt.evaluation.tasks.sets import UNNAMED


def write_report(files: Sequence[Path], out: Path, tasks: Sequence[str] | None = None) -> str:
    """Write ``index.html``, ``report.md`` and the pictures into a folder; returns the summary as Markdown.

    Args:
        files: Of records, read one after the other as if they were one.
        out: The folder; made if need be.
        tasks: Sets or tasks to report on; all that occur without it.

    Raises:
        ValueError: there is nothing to report, or what there is cannot stand in one report
            (:class:`~learnedopt.evaluation.scores.Runs`).
        ImportError: matplotlib or scipy is missing.
    """
    results = Results([record for file in files for record in read(file)], tasks)
    tables = [table for horizon in results.horizons for table in tables_of(results, horizon)]
    pictures = pictures_of(results)
    sources = list(_sources(results, files))
    losses = [line for horizon in results.horizons for line in _losses(results, horizon)]
    summary = "\n".join(summary_of(results, horizon).markdown() for horizon in results.horizons)
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
    yield f"pictures by matplotlib {matplotlib_version()}"
    for record in of_kind(results.records, "skip"):
        if record["task"] in results.tasks or record["contender"] in results.contenders:
            continue  # it ran later
        yield f"skipped {record['task'] or record['contender']}: {record['reason']}"


def _page(
    results: Results, tables: Sequence[Table], pictures: dict[str, bytes], losses: Sequence[str], sources: Sequence[str]
) -> str:
    def items(lines: Iterable[str]) -> str:
        return "<ul>" + "".join(f"<li>{marked(line)}</li>" for line in lines) + "</ul>"

    parts = [f"<h1>Optimizers on {len(results.tasks)} tasks</h1><p>{marked(_method(results))}</p>"]
    for horizon in results.horizons:
        parts += [f"<h2>{horizon} steps</h2>", summary_of(results, horizon).html()]
    parts += ["<h2>Where learned rules lose</h2>", items(losses or ["no learned rule was run"])]
    for name, data in pictures.items():
        kind, _, horizon_of = name.partition("-")
        image = base64.b64encode(data).decode()
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{image}"><figcaption>At {horizon_of} steps. '
            f"{html.escape(CAPTIONS[kind])} Made from {marked(', '.join(sources[:1]))}.</figcaption></figure>"
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


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)
