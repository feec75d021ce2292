"""The default optimizer, untuned, beside Adam on networks unlike those of its training.

    python benchmarks/default_rule.py --steps 500

Twelve small ``torch.nn`` models and their data, none of which needs a download. The loop is the one a user writes; only
the optimizer line differs. For each task:

* Adam and AdamW with a cosine schedule are tuned over ten learning rates by the smoothed final training loss on a
  selection seed; they, default Adam (1e-3) and the default ``LearnedOptimizer`` are then run on other seeds, the same
  initial weights and batches for all.
* *Speed-up* is VeLO's (Metz et al. 2022, arXiv:2211.09760): the steps that the lower envelope of lr-tuned Adam needs to
  reach the loss that the learned optimizer ends at, over the steps it took. Adam runs for twice as long, so 2 means
  "2 or more".

A run whose loss is not finite at any step counts as infinite. Results are saved after each task, and what is there for
the same rule and number of steps is not run again; delete the file to start afresh.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from learnedopt import LearnedOptimizer
from learnedopt.data import digits, python_docs
from learnedopt.meta.recipe import source_commit

GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2, 1e-1, 3e-1]
SELECTION_SEEDS, REPORTING_SEEDS = (100,), (0, 1, 2)
Batches = Callable[[Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Workload:
    """A model, its batches, and its loss; ``distance`` says what about it is new."""

    distance: str
    model: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    loss: Callable[..., Tensor] = F.cross_entropy


def rows(*data: Tensor, size: int = 64) -> Batches:
    def draw(generator: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(len(data[0]), (size,), generator=generator)
        return tuple(tensor[index] for tensor in data)

    return draw


def digit_rows(size: int = 64) -> Batches:
    return rows(*digits().train, size=size)


@cache
def tabular(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target)
    if y.dtype.is_floating_point:
        y = ((y - y.mean()) / y.std()).float().unsqueeze(1)
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6), y


def characters(length: int, size: int) -> Callable[[], Batches]:
    def make() -> Batches:
        text = python_docs().train
        window = torch.arange(length + 1)

        def draw(generator: Generator) -> tuple[Tensor, ...]:
            start = torch.randint(len(text) - length, (size, 1), generator=generator)
            chunk = text[start + window]
            return chunk[:, :-1], chunk[:, 1:]

        return draw

    return make


def sinusoid() -> Batches:
    def draw(generator: Generator) -> tuple[Tensor, ...]:
        x = torch.rand(32, 1, generator=generator) * 10 - 5
        return x, 3.0 * torch.sin(x - 1.0)

    return draw


def sequence_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Residual(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.enter, self.leave = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.flatten(1))
        for block in self.inner:
            x = x + block(x)
        return self.leave(x)


class RowLSTM(nn.Module):
    """Reads a digit row by row, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.leave = nn.LSTM(8, 32, num_layers=2, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.rnn(x.squeeze(1))[0][:, -1])


class CharGRU(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.enter, self.rnn = nn.Embedding(vocabulary, 32), nn.GRU(32, 64, batch_first=True)
        self.leave = nn.Linear(64, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.rnn(self.enter(x))[0])


class CharTransformer(nn.Module):
    """Two pre-norm layers, four heads, learned positions."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.enter, self.positions = nn.Embedding(vocabulary, 48), nn.Parameter(torch.zeros(length, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.leave = nn.Linear(48, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.layers(self.enter(x) + self.positions, mask=self.mask, is_causal=True))


class VAE(nn.Module):
    """Variational autoencoder of digits; returns its negative evidence lower bound."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        mean, log_var = self.encode(x).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        reconstruction = F.binary_cross_entropy_with_logits(self.decode(z), x, reduction="sum")
        divergence = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum()
        return (reconstruction + divergence) / len(x)


class SkipGram(nn.Module):
    """Predicts the next character pair from embeddings alone: most coordinates have no gradient in most steps."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Embedding(vocabulary**2, 16), nn.Linear(16, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x[:, :-1] * 64 + x[:, 1:]))


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += [nn.Linear(fan_in, fan_out)] + [activation()] * (i < len(widths) - 2)
    return nn.Sequential(*layers)


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(192, 10)),
    )


WORKLOADS: dict[str, Workload] = {
    "wide-mlp": Workload("8 times the widest trained on", lambda: mlp(64, 256, 256, 10), digit_rows),
    "deep-tanh": Workload(
        "11 layers; trained on up to 4", lambda: mlp(64, *[24] * 10, 10, activation=nn.Tanh), digit_rows
    ),
    "residual": Workload("residual blocks, SiLU", lambda: Residual(32, 4), digit_rows),
    "conv-bn": Workload("max-pooling, dropout, width", convnet, digit_rows),
    "tabular-classification": Workload(
        "tabular data, breast cancer",
        lambda: mlp(30, 64, 64, 2, activation=nn.GELU),
        lambda: rows(*tabular("breast_cancer")),
    ),
    "tabular-regression": Workload(
        "tabular data, diabetes", lambda: mlp(10, 50, 50, 1), lambda: rows(*tabular("diabetes")), F.mse_loss
    ),
    "sinusoid": Workload("function fitting", lambda: mlp(1, 40, 40, 1), sinusoid, F.mse_loss),
    "row-lstm": Workload("two-layer LSTM, sequence classification", RowLSTM, digit_rows),
    "char-gru": Workload("width, length, embedding", lambda: CharGRU(64), characters(24, 16), sequence_cross_entropy),
    "char-transformer": Workload(
        "heads, width, length", lambda: CharTransformer(64, 32), characters(32, 16), sequence_cross_entropy
    ),
    "vae": Workload(
        "variational objective, noise in the loss", VAE, lambda: rows(digits().train[0]), lambda loss: loss
    ),
    "skip-gram": Workload(
        "65,536 embedding coordinates, few with gradient",
        lambda: SkipGram(64),
        characters(16, 32),
        lambda logits, target: sequence_cross_entropy(logits, target[:, 1:]),
    ),
}


def train(workload: Workload, optimizer: str, lr: float, steps: int, seed: int) -> np.ndarray:
    """Training losses ``(steps + 1,)`` of one run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, batches, generator = workload.model(), workload.batches(), Generator().manual_seed(seed)
        torch.manual_seed(seed + 1)  # dropout and latent noise, the same for every optimizer
        schedule = None
        if optimizer == "learned":
            opt: torch.optim.Optimizer = LearnedOptimizer(model.parameters())
        elif optimizer == "adam":
            opt = torch.optim.Adam(model.parameters(), lr=lr)
        else:
            opt = torch.optim.AdamW(model.parameters(), lr=lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        losses = np.full(steps + 1, np.inf)
        for step in range(steps + 1):
            x, *target = batches(generator)
            loss = workload.loss(model(x), *target)
            losses[step] = loss.item()
            if not np.isfinite(losses[step]):
                losses[step:] = np.inf
                break
            opt.zero_grad()
            loss.backward()
            opt.step()
            if schedule is not None and step < steps:
                schedule.step()
    return losses


def smooth(losses: np.ndarray, decay: float = 0.95) -> np.ndarray:
    """Bias-corrected exponential moving average over steps, the last axis."""
    out, average = np.empty_like(losses), np.zeros(losses.shape[:-1])
    for t in range(losses.shape[-1]):
        average = decay * average + (1 - decay) * losses[..., t]
        out[..., t] = average / (1 - decay ** (t + 1))
    return out


def judge(workload: Workload, steps: int, progress: Callable[[], object]) -> dict[str, object]:
    def runs(optimizer: str, lr: float, length: int, seeds: tuple[int, ...]) -> np.ndarray:
        losses = np.stack([train(workload, optimizer, lr, length, seed) for seed in seeds])
        progress()
        return smooth(losses)

    adam = {lr: runs("adam", lr, 2 * steps, SELECTION_SEEDS) for lr in GRID}
    adamw = {lr: runs("adamw", lr, steps, SELECTION_SEEDS) for lr in GRID}
    best_adam = min(GRID, key=lambda lr: float(adam[lr][:, steps].mean()))
    best_adamw = min(GRID, key=lambda lr: float(adamw[lr][:, -1].mean()))
    finals = {
        "learned": runs("learned", 1.0, steps, REPORTING_SEEDS),
        "adam default": runs("adam", 1e-3, steps, REPORTING_SEEDS),
        "adam tuned": runs("adam", best_adam, steps, REPORTING_SEEDS),
        "adamw+cosine tuned": runs("adamw", best_adamw, steps, REPORTING_SEEDS),
    }
    envelope = np.minimum.accumulate(np.min([curve.mean(0) for curve in adam.values()], axis=0))
    reached = np.flatnonzero(envelope <= finals["learned"][:, -1].mean())
    needed = int(reached[0]) if len(reached) else 2 * steps
    return {
        "distance": workload.distance,
        "parameters": sum(p.numel() for p in workload.model().parameters()),
        "adam lr": best_adam,
        "adamw lr": best_adamw,
        "final": {name: [float(v) for v in curves[:, -1]] for name, curves in finals.items()},
        "diverged": int((~np.isfinite(finals["learned"])).any(1).sum()),
        "speed-up": needed / steps,
    }


def interquartile_mean(values: list[float]) -> float:
    """Mean of the middle half, the quarters cut off in proportion."""
    ordered, n = np.sort(values), len(values)
    weights = np.clip(np.minimum(np.arange(1, n + 1), 0.75 * n) - np.maximum(np.arange(n), 0.25 * n), 0, 1)
    return float((ordered * weights).sum() / weights.sum())


def table(results: dict[str, Any]) -> Iterator[str]:
    names = ["learned", "adam default", "adam tuned", "adamw+cosine tuned"]
    yield "| task | what is new | " + " | ".join(names) + " | speed-up |"
    yield "|---|---|" + "--:|" * (len(names) + 1)
    means = {task: {name: float(np.mean(result["final"][name])) for name in names} for task, result in results.items()}
    for task, result in results.items():
        cells = [f"{means[task][name]:.3g}" for name in names]
        yield f"| {task} | {result['distance']} | " + " | ".join(cells) + f" | {result['speed-up']:.2f} |"
    won = [sum(m["learned"] < m[name] for m in means.values()) for name in names[1:]]
    speed = interquartile_mean([result["speed-up"] for result in results.values()])
    diverged = sum(result["diverged"] for result in results.values())
    yield ""
    yield (
        f"Lower final training loss than default Adam on {won[0]} of {len(results)}, than Adam tuned per task on "
        f"{won[1]}, than AdamW with cosine tuned per task on {won[2]}; {diverged} diverged runs; interquartile mean "
        f"speed-up over lr-tuned Adam {speed:.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/default_rule.json"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tasks", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--table", action="store_true", help="print the table of --out again, run nothing")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(1)
        report: dict[str, Any] = {
            "command": "python benchmarks/default_rule.py",
            "commit": source_commit(),
            "torch": str(torch.__version__),
            "machine": f"1 CPU thread, {platform.machine()}",
            "steps": args.steps,
            "rule": LearnedOptimizer([torch.zeros(1)]).param_groups[0]["rule_sha256"],
            "results": {},
        }
        if args.out.exists():
            before = json.loads(args.out.read_text())
            if all(before[key] == report[key] for key in ("steps", "rule")):
                report["results"] = before["results"]
        missing = [name for name in args.tasks if name not in report["results"]]
        with tqdm(total=len(missing) * (2 * len(GRID) + 4), mininterval=5) as bar:
            for name in missing:
                bar.set_description(name)
                report["results"][name] = judge(WORKLOADS[name], args.steps, bar.update)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(json.loads(args.out.read_text())["results"])))


if __name__ == "__main__":
    main()
