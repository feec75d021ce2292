"""The quadratic and MNIST figures of Andrychowicz et al. 2016 (arXiv:1606.04474), as a table and a picture.

Usage: ``python benchmarks/l2l_figures.py --root DIR``, where DIR holds MNIST in MNIST/raw (or add ``--download``).

What is compared: the trained LSTM optimizers of the zoo, untuned, with SGD, NAG (momentum 0.9), Adam and RMSprop.
Each of these is tuned for each setting, for each step at which it is judged, and for mean and median apart, over 15
learning rates (more where the best is at an edge of the grid), on problems drawn from another seed. The mean in the
table is that of the run tuned for the mean, the median that of the run tuned for the median. All optimizers are then
judged on the same fresh problems: same start, same minibatches.

What is measured: the training loss at step T. On MNIST it is the loss of a minibatch of 128, as in the paper, averaged
over the steps T-9 to T to take out noise of the minibatches; beside it stands the loss of the 10,000 test images at
the last step. A diverged run counts as an infinite loss. Intervals are 95 % bootstrap intervals over problems.

On MNIST the LSTM has learned from a teacher, a hand-written optimizer with a schedule (``meta_training/mnist_mlp.py``).
It is run too, as it is in the recipe. It counts as no baseline, since it is not tuned here, but whoever has it may ask
what the LSTM adds.

Results are saved after each optimizer. What is there and was made with the same settings is not run again, so that the
whole may be run in pieces, and different settings at the same time; delete the JSON file to start afresh.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import learnedopt
from learnedopt.data import ImageData, mnist
from learnedopt.evaluation import Estimate, bootstrap, paired_ratio, share_below
from learnedopt.evaluation.statistics import mean, median
from learnedopt.meta import MetaTrainConfig, SGDTeacher, load_recipe
from learnedopt.optim import LearnedOptimizer
from learnedopt.runs import source_commit
from learnedopt.tasks import MLPClassification, Quadratics, TaskFamily
from learnedopt.zoo import load_rule, rule_fingerprint

# Run as a file, a program finds the modules of its own folder only.
sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.harness.baselines import BASELINES, GRID, Criterion, tune
from benchmarks.harness.runs import Run, run_problems

HAND_WRITTEN = ("sgd", "nag", "rmsprop", "adam")
NAMES = {
    "sgd": "SGD",
    "nag": "NAG",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "teacher": "the LSTM's teacher",
    "lstm": "LSTM",
}
RECIPES = Path(__file__).parents[1] / "meta_training"
STATISTICS: tuple[Literal["mean", "median"], ...] = ("mean", "median")
SELECTION_SEED, REPORTING_SEED = 1, 2


@dataclass(frozen=True)
class Setting:
    """One panel of the figure."""

    title: str
    family: TaskFamily
    rule: str
    """The LSTM's name in the zoo, or its folder."""
    horizons: tuple[int, ...]
    """The steps at which optimizers are judged."""
    window: int
    """How many of the last steps are averaged."""
    problems: int
    selection_problems: int
    """On which learning rates are chosen."""
    chunk: int
    """How many problems run at once; part of what determines the problems."""
    test: tuple[Tensor, Tensor] | None = None
    """Inputs and classes on which the parameters after the last step are judged too."""
    teacher: SGDTeacher | None = None
    """What the LSTM has learned from."""


def settings(names: Sequence[str], load_mnist: Callable[[], ImageData], problems: int) -> dict[str, Setting]:
    """The settings of these names; quadratics are cheap and get ten times the problems."""

    def quadratic(entries: Literal["gaussian", "uniform"], rule: str) -> Setting:
        return Setting(
            title=f"Quadratics, {entries} W and y",
            family=Quadratics(entries=entries),
            rule=rule,
            horizons=(100,),
            window=1,
            problems=10 * problems,
            selection_problems=1000,
            chunk=500,
        )

    def network(title: str, hidden: tuple[int, ...] = (20,), activation: str = "sigmoid") -> Setting:
        data = load_mnist()
        images, labels = data.test
        return Setting(
            title=f"MNIST, {title}",
            family=MLPClassification(data, (hidden,), (activation,), initial_std=None),
            rule="mnist-mlp",
            horizons=(100, 200),
            window=10,
            problems=problems,
            selection_problems=20,
            chunk=20,
            test=(images.flatten(1), labels),
            teacher=teacher_of(RECIPES / "mnist_mlp.py"),
        )

    makers: dict[str, Callable[[], Setting]] = {
        "quadratic-gaussian": lambda: quadratic("gaussian", "quadratic"),
        "quadratic-uniform": lambda: quadratic("uniform", "quadratic-uniform"),
        "mnist": lambda: network("one layer of 20 sigmoid units"),
        "mnist-40": lambda: network("one layer of 40 sigmoid units", hidden=(40,)),
        "mnist-two-layers": lambda: network("two layers of 20 sigmoid units", hidden=(20, 20)),
        "mnist-relu": lambda: network("one layer of 20 ReLU units", activation="relu"),
    }
    if unknown := sorted(set(names) - makers.keys()):
        raise ValueError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(makers)}")
    return {name: make() for name, make in makers.items() if not names or name in names}


def run_setting(setting: Setting, done: dict[str, Any], save: Callable[[dict[str, Any]], None], command: str) -> None:
    """Bring ``done``, the results of a setting, up to date; ``save`` it after each optimizer."""
    rule = load_rule(setting.rule)
    common = {
        "family": repr(setting.family),
        "horizons": list(setting.horizons),
        "window": setting.window,
        "problems": setting.problems,
        "chunk": setting.chunk,
        "reporting_seed": REPORTING_SEED,
    }
    tuning = {"selection_problems": setting.selection_problems, "selection_seed": SELECTION_SEED, "grid": list(GRID)}
    configs = dict.fromkeys(HAND_WRITTEN, common | tuning) | {"lstm": common | {"sha256": rule_fingerprint(rule)}}
    if setting.teacher is not None:
        configs["teacher"] = common | {"teacher": repr(setting.teacher)}
    # Results of other problems cannot stand beside new ones.
    parts = {name: part for name, part in done.get("optimizers", {}).items() if part["config"] == configs[name]}
    done.update(title=setting.title, horizons=setting.horizons, window=setting.window, problems=setting.problems)
    done["optimizers"] = parts
    for name, config in configs.items():
        if name in parts:
            continue
        start = time.perf_counter()
        if name == "lstm":
            results = run_once(name, setting, lambda params: LearnedOptimizer(params, rule=rule), stacked=False)
        elif setting.teacher is not None and name == "teacher":
            results = run_once(name, setting, partial(scheduled, setting.teacher), stacked=True)
        else:
            results = run_baseline(name, setting)
        seconds = round(time.perf_counter() - start, 1)
        parts[name] = {"config": config, **results, "seconds": seconds, "provenance": provenance(command)}
        save(done)


def run_baseline(name: str, setting: Setting) -> dict[str, Any]:
    """Tune a baseline for each horizon and statistic, and run it on the reporting problems."""
    last = max(setting.horizons)
    bar = tqdm(desc=f"{setting.title}: {NAMES[name]}", unit="run")

    def losses(lr: float, problems: int, steps: int, seed: int) -> Run:
        bar.update()

        def make(params: Iterable[Tensor]) -> Optimizer:
            return BASELINES[name](params, lr)

        return run_problems(setting.family, make, problems, steps, seed, chunk=setting.chunk, stacked=True)

    @functools.cache
    def selection(lr: float) -> Tensor:
        return losses(lr, setting.selection_problems, last, SELECTION_SEED).losses

    tuning, entries = [], []
    for horizon in setting.horizons:
        chosen: dict[float, list[str]] = {}
        for statistic in STATISTICS:
            criterion = Criterion(horizon, setting.window, statistic)
            tuned = tune(lambda lr, criterion=criterion: criterion(selection(lr)))  # type: ignore[misc]
            chosen.setdefault(tuned.lr, []).append(statistic)
            scores = [[lr, to_json(score)] for lr, score in tuned.scores.items()]
            tuning.append(
                {"horizon": horizon, "statistic": statistic, "lr": tuned.lr, "at_edge": tuned.at_edge, "scores": scores}
            )
        for lr, tuned_for in chosen.items():
            result = losses(lr, setting.problems, horizon, REPORTING_SEED)
            entries.append({"lr": lr, "tuned_for": tuned_for, **judge(setting, result, horizon)})
    bar.close()
    return {"tuning": tuning, "entries": entries}


def teacher_of(recipe: Path) -> SGDTeacher | None:
    training = load_recipe(recipe).training
    imitation = training.imitation if isinstance(training, MetaTrainConfig) else None
    teacher = None if imitation is None else imitation.teacher
    return teacher if isinstance(teacher, SGDTeacher) else None


def scheduled(teacher: SGDTeacher, params: Iterable[Tensor]) -> Optimizer:
    """The teacher with its schedule, as an optimizer of parameters."""
    optimizer = torch.optim.SGD(params, lr=teacher.lr, momentum=teacher.momentum, nesterov=teacher.nesterov)
    steps = itertools.count()

    def set_rate(optimizer: Optimizer, *arguments: Any) -> None:
        optimizer.param_groups[0]["lr"] = teacher.lr_at(next(steps))

    optimizer.register_step_pre_hook(set_rate)
    return optimizer


def run_once(
    name: str, setting: Setting, make: Callable[[Iterable[Tensor]], Optimizer], stacked: bool
) -> dict[str, Any]:
    """Run what is not tuned, and judge that run at every horizon."""
    with tqdm(desc=f"{setting.title}: {NAMES[name]}", total=1, unit="run") as bar:
        result = run_problems(
            setting.family,
            make,
            setting.problems,
            max(setting.horizons),
            REPORTING_SEED,
            chunk=setting.chunk,
            stacked=stacked,
        )
        bar.update()
    entries = [
        {"lr": None, "tuned_for": list(STATISTICS), **judge(setting, result, horizon)} for horizon in setting.horizons
    ]
    return {"entries": entries}


def judge(setting: Setting, result: Run, horizon: int) -> dict[str, Any]:
    """The losses of each problem at a horizon and, at the last one, test losses and curves."""
    values = Criterion(horizon, setting.window).values(result.losses)
    entry: dict[str, Any] = {"horizon": horizon, "values": to_json(values), "test_values": None, "curves": None}
    if horizon == max(setting.horizons):
        if setting.test is not None:
            entry["test_values"] = to_json(test_losses(setting, setting.test, result))
        losses = result.losses.numpy()
        # No interpolation: nothing lies between a finite loss and that of a diverged run.
        low, high = np.quantile(losses, [0.25, 0.75], axis=1, method="inverted_cdf")
        curves = {"mean": losses.mean(1), "median": np.median(losses, axis=1), "low": low, "high": high}
        entry["curves"] = {key: to_json(curve) for key, curve in curves.items()}
    return entry


def test_losses(setting: Setting, test: tuple[Tensor, Tensor], result: Run) -> Tensor:
    """The loss of every problem's final parameters on the whole test set; infinite where the run diverged."""
    task = setting.family.draw(torch.Generator().manual_seed(0), setting.problems)
    values: Tensor = torch.func.vmap(task.loss, in_dims=(0, None), chunk_size=setting.chunk)(result.params, test)
    return values.masked_fill(result.losses[-1].isinf(), math.inf)


def provenance(command: str) -> dict[str, Any]:
    """Where a result comes from."""
    return {
        "command": command,
        "commit": source_commit(),
        "learnedopt": learnedopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def to_json(values: Any) -> Any:
    """Numbers of six digits; ``None`` for infinity, which JSON lacks."""
    if isinstance(values, Tensor | np.ndarray):
        return [to_json(value) for value in values.tolist()]
    return float(f"{values:.6g}") if math.isfinite(values) else None


def from_json(values: list[float | None]) -> list[float]:
    return [math.inf if value is None else value for value in values]


def entry_of(part: dict[str, Any], horizon: int, statistic: str) -> dict[str, Any]:
    """The results of an optimizer tuned for ``statistic`` at ``horizon``."""
    entry: dict[str, Any]
    (entry,) = (e for e in part["entries"] if e["horizon"] == horizon and statistic in e["tuned_for"])
    return entry


def table(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    lines = [
        "# LSTM optimizers and tuned baselines on the problems of Andrychowicz et al. 2016",
        "",
        "Made by `benchmarks/l2l_figures.py`, whose docstring says how. Losses with 95 % bootstrap intervals over",
        "problems. Baselines are tuned for mean and median apart, and each column is of the run tuned for it; learning",
        "rates and diverged runs are given for both (mean / median). The test loss is that of the run tuned for the",
        "mean. *LSTM lower* is the share of problems on which the LSTM ends below the baseline tuned for the median.",
    ]
    for setting in results.values():
        parts = setting["optimizers"]
        for horizon in setting["horizons"]:
            first = horizon - setting["window"] + 1
            judged = f"loss at step {horizon}" if first == horizon else f"mean loss of steps {first} to {horizon}"
            lines += [
                "",
                f"## {setting['title']}: step {horizon}",
                "",
                f"{setting['problems']} problems, {judged}.",
                "",
                "| optimizer | learning rates | mean | median | diverged | mean test loss | LSTM lower |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [row(name, parts, horizon) for name in NAMES if name in parts]
            if "lstm" in parts:
                lines += ["", *(verdict(parts, horizon, statistic) for statistic in STATISTICS)]
    return "\n".join(lines) + "\n"


def row(name: str, parts: dict[str, Any], horizon: int) -> str:
    for_mean, for_median = (entry_of(parts[name], horizon, statistic) for statistic in STATISTICS)
    by_mean, by_median = (from_json(entry["values"]) for entry in (for_mean, for_median))
    rates = "untuned" if for_mean["lr"] is None else f"{for_mean['lr']:.3g} / {for_median['lr']:.3g}"
    if any(tuned["at_edge"] for tuned in parts[name].get("tuning", []) if tuned["horizon"] == horizon):
        rates += " (at the edge of the grid)"
    diverged = " / ".join(f"{np.isinf(values).sum()}" for values in (by_mean, by_median))
    test = "" if for_mean["test_values"] is None else f"{np.mean(from_json(for_mean['test_values'])):.3g}"
    lower = ""
    if name != "lstm" and "lstm" in parts:
        lower = f"{share_below(from_json(entry_of(parts['lstm'], horizon, 'median')['values']), by_median):.0%}"
    averages = interval(bootstrap(mean, by_mean)), interval(bootstrap(median, by_median))
    return f"| {' | '.join((NAMES[name], rates, *averages, diverged, test, lower))} |"


def interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def verdict(parts: dict[str, Any], horizon: int, statistic: Literal["mean", "median"]) -> str:
    """The LSTM against the best of the tuned baselines, in one line."""
    average = mean if statistic == "mean" else median
    values = {name: np.array(from_json(entry_of(part, horizon, statistic)["values"])) for name, part in parts.items()}
    baselines = [name for name in HAND_WRITTEN if name in values]
    if not baselines:
        return f"- {statistic}: no baseline has been run."
    best = min(baselines, key=lambda name: float(average(values[name])))

    def against(name: str) -> str:
        ratio = paired_ratio(average, values["lstm"], values[name])
        where = "below" if ratio.value < 1 else "not below"
        if ratio.low <= 1 <= ratio.high:
            where += " (the interval includes 1)"
        return f"{where} {{}}; paired ratio {interval(ratio)}"

    text = f"- {statistic}: the LSTM is " + against(best).format(f"the best tuned baseline, {NAMES[best]}")
    return text + (", and " + against("teacher").format("its teacher") if "teacher" in values else "") + "."


def picture(results: dict[str, Any], file: Path) -> None:
    """One panel per setting: the median loss at each step and the quartiles, tuned for the median at the last step."""
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    for axes, setting in zip(figure.subplots(rows, columns, squeeze=False).flat, results.values()):
        parts = setting["optimizers"]
        for color, name in enumerate(NAMES):
            if name not in parts:
                continue
            curves = entry_of(parts[name], max(setting["horizons"]), "median")["curves"]
            center, low, high = (from_json(curves[key]) for key in ("median", "low", "high"))
            style: dict[str, Any] = {"color": f"C{color}"}
            axes.plot(center, label=NAMES[name], linewidth=2 if name == "lstm" else 1, **style)
            axes.fill_between(range(len(low)), low, high, alpha=0.15, linewidth=0, **style)
        for horizon in setting["horizons"][:-1]:
            axes.axvline(horizon, color="grey", linestyle=":", linewidth=1)
        axes.set(title=setting["title"], xlabel="step", ylabel="loss", yscale="log")
        axes.legend(fontsize="small")
    for axes in figure.axes[len(results) :]:
        axes.remove()
    figure.savefig(file, dpi=120)


def render(results: dict[str, Any], out: Path) -> None:
    """Write the table and the picture beside the JSON."""
    out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    picture(results, out.with_suffix(".png"))


def benchmark(chosen: dict[str, Setting], out: Path, command: str = "") -> None:
    """Run what is missing in ``out``'s JSON file, and write all three files."""
    raw = out.with_suffix(".json")
    raw.parent.mkdir(parents=True, exist_ok=True)

    def read() -> dict[str, Any]:
        return json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {}

    for name, setting in chosen.items():

        def save(done: dict[str, Any], name: str = name) -> None:
            # Read again: another process may be at work on other settings.
            results = read() | {name: done}
            written = raw.with_suffix(f".{name}.tmp")
            written.write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
            written.replace(raw)

        run_setting(setting, read().get(name, {}), save, command)
    # From the file and not from memory, so that --table gives the same.
    render(read(), out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, help="folder with MNIST")
    parser.add_argument("--download", action="store_true", help="download MNIST to --root if it is not there")
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--problems", type=int, default=100, help="fresh problems; ten times as many for quadratics")
    parser.add_argument(
        "--rule", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"), help="use FOLDER for a zoo entry"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "l2l_figures")
    parser.add_argument("--table", action="store_true", help="only make table and picture again")
    args = parser.parse_args(arguments)
    if args.table:
        render(json.loads(args.out.with_suffix(".json").read_text(encoding="utf-8")), args.out)
        return

    def load_mnist() -> ImageData:
        if args.root is None:
            parser.error("the MNIST settings need --root DIR")
        return mnist(args.root, args.download)

    torch.set_num_threads(1)
    try:
        chosen = settings(args.settings, load_mnist, args.problems)
    except ValueError as error:
        parser.error(str(error))
    if args.rule:
        folders = dict(args.rule)
        chosen = {name: replace(one, rule=folders.get(one.rule, one.rule)) for name, one in chosen.items()}
    # Without folders, which are only this machine's.
    command = ["python", "benchmarks/l2l_figures.py", "--root", "DIR", "--problems", str(args.problems)]
    benchmark(chosen, args.out, shlex.join([*command, "--settings", *chosen]))


if __name__ == "__main__":
    main()
