"""The demonstration: a trained rule beside Adam and SGD, in the loop everybody writes, on scikit-learn's digits."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt import zoo
from learnedopt.data import ImageData, digits
from learnedopt.optim import LearnedOptimizer, LSTMOptimizer

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Demo:
    """What is trained, how long, and how the baselines are tuned."""

    networks: tuple[tuple[str, tuple[int, ...]], ...] = (("sigmoid", (64, 32, 10)), ("relu", (64, 32, 32, 10)))
    """Activation and widths of each multilayer perceptron."""
    steps: int = 300
    batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Every optimizer meets each of these once: the same initial weights, the same batches."""
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    """Learning rates are chosen by the median final training loss over these."""
    adam_rates: tuple[float, ...] = tuple(10 ** (-4 + k / 4) for k in range(15))
    sgd_rates: tuple[float, ...] = tuple(10 ** (-3 + k / 4) for k in range(15))
    """SGD has momentum 0.9."""
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.evaluate_every < 1 or not self.seeds or not self.tuning_seeds:
            raise ValueError("a demonstration needs at least one step, one seed and one seed for tuning")


@dataclass(frozen=True)
class Run:
    """One network trained once."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Loss on the whole training set at ``steps``; infinite where it is not a number."""
    test_loss: float
    test_accuracy: float
    seconds_per_step: float
    """Of the training loop: forward, backward and ``optimizer.step()``."""


@dataclass(frozen=True)
class Row:
    """One optimizer on one network."""

    label: str
    runs: tuple[Run, ...]
    """One per seed."""


@dataclass(frozen=True)
class Panel:
    """All optimizers on one network."""

    title: str
    rows: tuple[Row, ...]


def build_network(activation: str, widths: Sequence[int], seed: int) -> nn.Sequential:
    """An MLP with torch's default initialization, drawn from a seed; the global generator is left as it was."""
    nonlinearity = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}[activation]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nonlinearity()]
    return nn.Sequential(*layers[:-1])


def train(demo: Demo, model: nn.Module, optimizer: torch.optim.Optimizer, data: ImageData, seed: int) -> Run:
    """The ordinary training loop, with the full training loss now and then."""
    images, labels = data.split("train")
    batches = torch.Generator().manual_seed(seed)
    steps, losses, seconds = [0], [_loss(model, images, labels)], 0.0
    for step in range(1, demo.steps + 1):
        index = torch.randint(len(labels), (demo.batch_size,), generator=batches)
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        seconds += time.perf_counter() - started
        if step % demo.evaluate_every == 0 or step == demo.steps:
            steps.append(step)
            losses.append(_loss(model, images, labels))
    test_images, test_labels = data.split("test")
    with torch.no_grad():
        accuracy = (model(test_images).argmax(-1) == test_labels).float().mean().item()
    test_loss = _loss(model, test_images, test_labels)
    return Run(tuple(steps), tuple(losses), test_loss, accuracy, seconds / demo.steps)


def count(demo: Demo) -> int:
    """How many times a network is trained."""
    tuning = (len(demo.adam_rates) + len(demo.sgd_rates)) * len(demo.tuning_seeds)
    contenders = 4 + ("mnist-mlp" in zoo.list_entries())
    return len(demo.networks) * (tuning + contenders * len(demo.seeds))


def compare(demo: Demo, activation: str, widths: Sequence[int], trained: Callable[[], object] = lambda: None) -> Panel:
    """Train one network with every optimizer, after tuning Adam and SGD on seeds of their own.

    Args:
        demo: How.
        activation, widths: Of the network.
        trained: Called each time one has been trained.

    Raises:
        ImportError: scikit-learn is not installed.
        ZooError: the zoo has no default rule.
    """
    data = digits()

    def runs(make: MakeOptimizer, seeds: Sequence[int]) -> tuple[Run, ...]:
        models = [build_network(activation, widths, seed) for seed in seeds]
        found = []
        for model, seed in zip(models, seeds):
            found.append(train(demo, model, make(model.parameters()), data, seed))
            trained()
        return tuple(found)

    def tuned(make: Callable[[float], MakeOptimizer], rates: Sequence[float]) -> float:
        return min(rates, key=lambda rate: _median(run.losses[-1] for run in runs(make(rate), demo.tuning_seeds)))

    def adam(rate: float) -> MakeOptimizer:
        return lambda params: torch.optim.Adam(params, lr=rate)

    def sgd(rate: float) -> MakeOptimizer:
        return lambda params: torch.optim.SGD(params, lr=rate, momentum=0.9)

    adam_rate, sgd_rate = tuned(adam, demo.adam_rates), tuned(sgd, demo.sgd_rates)
    contenders: dict[str, MakeOptimizer] = {"LearnedOptimizer, untuned": LearnedOptimizer}
    if "mnist-mlp" in zoo.list_entries():
        contenders["Andrychowicz LSTM (mnist-mlp)"] = LSTMOptimizer
    contenders["Adam, default (lr 0.001)"] = torch.optim.Adam
    contenders[f"Adam, tuned (lr {adam_rate:.2g})"] = adam(adam_rate)
    contenders[f"SGD momentum 0.9, tuned (lr {sgd_rate:.2g})"] = sgd(sgd_rate)
    rows = tuple(Row(label, runs(make, demo.seeds)) for label, make in contenders.items())
    return Panel(f"{activation} network {'-'.join(map(str, widths))}", rows)


def table(panel: Panel) -> str:
    """The panel's results as text: median over seeds, and the range in brackets."""
    header = ("", "training loss", "test loss", "test accuracy", "ms/step")
    lines = [header]
    for row in panel.rows:
        lines.append(
            (
                row.label,
                _summary([run.losses[-1] for run in row.runs], "{:.4f}"),
                _summary([run.test_loss for run in row.runs], "{:.3f}"),
                _summary([100 * run.test_accuracy for run in row.runs], "{:.1f}") + " %",
                f"{1000 * _median(run.seconds_per_step for run in row.runs):.2f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([panel.title, body[0], "-" * (sum(widths) + 2 * len(widths) - 2), *body[1:]])


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Write the curves as a picture: median of the training loss over seeds, the range as a band.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'learnedopt[train]'") from error
    # A figure of its own, without pyplot: no window system is asked for, no global state is touched.
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for row in panel.rows:
            steps = row.runs[0].steps
            curves = list(zip(*(run.losses for run in row.runs)))
            (line,) = axes.plot(steps, [_median(values) for values in curves], label=row.label)
            low, high = [min(values) for values in curves], [max(values) for values in curves]
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(title=panel.title, xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        loss = F.cross_entropy(model(images), labels).item()
    return loss if math.isfinite(loss) else math.inf


def _median(values: Any) -> float:
    return float(statistics.median(values))


def _summary(values: Sequence[float], form: str) -> str:
    low, middle, high = (form.format(value) for value in (min(values), _median(values), max(values)))
    return f"{middle} [{low}, {high}]"
