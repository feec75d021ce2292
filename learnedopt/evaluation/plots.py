"""The pictures of the benchmark's report."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from learnedopt.evaluation.benchmark import YARDSTICK
from learnedopt.evaluation.records import decode
from learnedopt.evaluation.scores import OPPONENTS, TAUS, Entry, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLORS = {
    "default": "#d62728",
    "sf-eigen-2": "#d62728",
    "sf-eigen-1": "#8c1a1a",
    "light": "#ff7f0e",
    "sf-adam-2": "#ff7f0e",
    "sf-adam-1": "#b35900",
    "adam": "#1f77b4",
    "adamw": "#17becf",
    "sgd": "#7f7f7f",
    "soap": "#9467bd",
    "muon": "#2ca02c",
    "adamw-cosine": "#1b3f8b",
    "schedule-free": "#8c564b",
    "rmsprop": "#98df8a",
    "nadam": "#aec7e8",
    "adam-lstm": "#e377c2",
    "mnist-mlp": "#bcbd22",
    "rnnprop": "#006400",
}
"""Of the optimizers that the benchmark knows best; an alias has that of the entry."""
_OTHERS = ("#daa520", "#c49c94", "#ff1493", "#4b0082", "#808000", "#00ced1", "#b8860b", "#2f4f4f")


def pictures_of(results: Results) -> dict[str, bytes]:
    """The files of all pictures, PNG, by name: what is shown, a hyphen and the horizon."""
    drawn = {}
    for horizon in results.horizons:
        for name, draw in _PICTURES.items():
            if (figure := draw(results, horizon)) is not None:
                drawn[f"{name}-{horizon}"] = _png(figure)
    return drawn


def matplotlib_version() -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'learnedopt[bench]'") from error
    return str(matplotlib.__version__)


def _grid(count: int, columns: int = 4) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for extra in axes[count:]:
        extra.remove()
    return figure, axes[:count]


def color_of(contender: str) -> str:
    """The color of an optimizer, the same in every picture: its own if it is a known one, else one by its name."""
    if contender in COLORS:
        return COLORS[contender]
    return _OTHERS[zlib.crc32(contender.encode()) % len(_OTHERS)]


def _style(results: Results, entry: Entry) -> dict[str, object]:
    """A color for each contender, learned ones thick; whole lines as one would use it: tuned, unless it is learned."""
    return {
        "color": color_of(entry.contender),
        "linewidth": 2.2 if results.is_learned(entry) else 1.2,
        "linestyle": "-" if entry.tuned != results.is_learned(entry) else "-." if entry.tuned else "--",
    }


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # As many columns as the figure has room for, so that no label is cut.
    columns = max(1, int(figure.get_figwidth() / (0.8 + 0.09 * max(map(len, labels), default=1))))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, columns, len(labels)), fontsize="small")


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
        axes.axvline(1.0, color="gray", linestyle=":", linewidth=1)
        axes.set(title=task, xlabel="learning rate / default", ylabel="final loss", xscale="log", yscale="log")
    _legend(figure, max(panels, key=lambda axes: len(axes.lines)))
    return figure


def _cost(results: Results, horizon: int) -> Figure | None:
    """What a step costs, and what it is worth."""
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
    axes.axhline(1.0, color="gray", linestyle=":", linewidth=1)
    axes.set(
        xlabel="time of a step, in times of its gradient (geometric mean over tasks)",
        ylabel="speed-up in steps over lr-tuned Adam (IQM)",
    )
    _legend(figure, axes)
    return figure


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    # Without the metadata that names a version, so that the bytes depend on the picture alone.
    figure.savefig(data, format="png", dpi=80, metadata={"Software": None})
    return data.getvalue()


_PICTURES: dict[str, Callable[[Results, int], Figure | None]] = {
    "curves": _curves,
    "profiles": _profiles,
    "sensitivity": _sensitivity,
    "cost": _cost,
}
CAPTIONS = {
    "curves": "Training loss: median over seeds; band between quartiles for learned rules and Adam. Learned rules "
    "untuned, the others tuned, default Adam dashed.",
    "profiles": "Performance profiles: the share of tasks on which the target is reached within τ times the time of "
    "the fastest. Dashed: hand-written, untuned; dash-dotted: learned, tuned.",
    "sensitivity": "Sensitivity: the final training loss over the learning rate, in multiples of the default, mean "
    "over the selection seeds. A gap is a diverged run.",
    "cost": "What a step costs and what it is worth. Triangles: untuned, discs: tuned.",
}
