"""What a step of the zoo's defaults costs on seven models, in the same process as what one would take instead.

    python benchmarks/step_share.py            # as published; some minutes, on a machine that does nothing else
    python benchmarks/step_share.py --quick    # everything once

Rows are fused Adam, Schedule-Free AdamW, torch's Muon (matrices; fused Adam for the rest), SOAP of pytorch_optimizer
(bases every ten steps), the zoo's ``default`` and ``light``, compiled and without a compiler, and the default's
predecessor ``sf-eigen-1``. Those whose package is not installed are left out, and Muon where the processor has no
instructions for bfloat16: it computes in that, and there a step on the second model takes seconds.

Gradients are those of one batch. Blocks of ten steps, at one of which bases follow, are interleaved, each row once in
every round; figures are medians over rounds of processor time, divided by ten. The *first step* makes the state.
*Share* is the part of a training step, with forward and backward measured in the same rounds. *State* is the bytes of
``optimizer.state`` per parameter.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import learnedopt
from learnedopt import LearnedOptimizer
from learnedopt.runs import source_commit

Make = Callable[[list[nn.Parameter]], list[Optimizer]]
Model = tuple[list[nn.Parameter], Callable[[], Tensor]]
STEPS = 10


# Models --------------------------------------------------------------------------------------------------------------


def perceptron(widths: tuple[int, ...], batch: int) -> Model:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    return list(network.parameters()), lambda: F.cross_entropy(network(x), y)


def resnet() -> Model:
    network = importlib.import_module("torchvision").models.resnet18(num_classes=10)
    x, y = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    return list(network.parameters()), lambda: F.cross_entropy(network(x), y)


class Transformer(nn.Module):
    """Of characters, with learned positions."""

    def __init__(self, layers: int, width: int, length: int, vocabulary: int = 65) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(x) + self.places, mask=self.mask, is_causal=True)
        out: Tensor = self.head(hidden)
        return out


def transformer(layers: int, width: int, batch: int, length: int) -> Model:
    network = Transformer(layers, width, length)
    x = torch.randint(65, (batch, length + 1))
    return list(network.parameters()), lambda: F.cross_entropy(network(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def low_rank(pairs: int, width: int, rank: int) -> Model:
    """Pairs of matrices as LoRA trains them, each on its own regression."""
    starts = [x for _ in range(pairs) for x in (torch.randn(rank, width) / width**0.5, torch.zeros(width, rank))]
    params = [nn.Parameter(start) for start in starts]
    x, y = torch.randn(4, width), torch.randn(4, width)

    def loss() -> Tensor:
        return torch.stack([((x @ a.T @ b.T) - y).square().mean() for a, b in zip(params[::2], params[1::2])]).mean()

    return params, loss


def embedding(vocabulary: int, width: int) -> Model:
    tokens, head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    x = torch.randint(vocabulary, (256,))
    return [*tokens.parameters(), *head.parameters()], lambda: F.cross_entropy(head(tokens(x)), x.roll(1))


MODELS: dict[str, Callable[[], Model]] = {
    "MLP 64-32-32-10": lambda: perceptron((64, 32, 32, 10), 64),
    "MLP 784-512-512-10": lambda: perceptron((784, 512, 512, 10), 128),
    "ResNet-18, 32 × 64×64": resnet,
    "transformer 4×128, 16 × 64": lambda: transformer(4, 128, 16, 64),
    "transformer 6×384, 8 × 128": lambda: transformer(6, 384, 8, 128),
    "LoRA, 200 × (8, 768)": lambda: low_rank(200, 768, 8),
    "embedding and head, 50,257 × 384": lambda: embedding(50257, 384),
}


# Optimizers ----------------------------------------------------------------------------------------------------------


def learned(rule: str, backend: str) -> Make:
    return lambda params: [LearnedOptimizer(params, rule=rule, backend=backend)]  # type: ignore[arg-type]


def has_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16", " bf16"))


def muon(params: list[nn.Parameter]) -> list[Optimizer]:
    matrices: list[Tensor] = [param for param in params if param.dim() == 2]
    others: list[Tensor] = [param for param in params if param.dim() != 2]
    return [torch.optim.Muon(matrices), *([Adam(others, fused=True)] if others else [])]


def installed(module: str, name: str, **options: Any) -> Make | None:
    try:
        kind = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    return lambda params: [kind(params, **options)]


def optimizers() -> dict[str, Make]:
    found: dict[str, Make | None] = {
        "Adam, fused": lambda params: [Adam(params, fused=True)],
        "Schedule-Free AdamW": installed("schedulefree", "AdamWScheduleFree"),
        "Muon": muon if has_bfloat16() else None,
        "SOAP (pytorch_optimizer)": installed("pytorch_optimizer", "SOAP"),
        "sf-eigen-1": learned("sf-eigen-1", "native"),
        "default": learned("default", "native"),
        "default, no compiler": learned("default", "blocked"),
        "light": learned("light", "native"),
        "light, no compiler": learned("light", "blocked"),
    }
    return {name: make for name, make in found.items() if make is not None}


# Measuring -----------------------------------------------------------------------------------------------------------


def clock(work: Callable[[], object], times: int = 1) -> float:
    """Milliseconds of processor time."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times * 1e3


def state_bytes(made: Iterable[Optimizer]) -> int:
    states = [state for optimizer in made for state in optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    lists = [x for state in states for value in state.values() if isinstance(value, list) for x in value]
    return sum(x.numel() * x.element_size() for x in [*tensors, *(x for x in lists if isinstance(x, Tensor))])


def measure(make_model: Callable[[], Model], rows: dict[str, Make], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    params, loss = make_model()

    def backward() -> None:
        for param in params:
            param.grad = None
        loss().backward()

    backward()
    made: dict[str, list[Optimizer]] = {}
    first: dict[str, float] = {}
    for name, make in rows.items():
        own = [nn.Parameter(param.detach().clone()) for param in params]
        for mine, param in zip(own, params):
            mine.grad = None if param.grad is None else param.grad.clone()
        made[name] = make(own)
        for optimizer in made[name]:
            if hasattr(optimizer, "train"):
                optimizer.train()
        first[name] = clock(lambda name=name: [optimizer.step() for optimizer in made[name]])  # type: ignore[misc]
    for each in made.values():  # past the steps in which bases follow every time
        for _ in range(STEPS):
            for optimizer in each:
                optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in rows}
    gradient = []
    for _ in range(rounds):
        gradient.append(clock(backward))
        for name, each in made.items():
            times[name].append(clock(lambda each=each: [optimizer.step() for optimizer in each], STEPS))  # type: ignore[misc]
    count = sum(param.numel() for param in params)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "parameters": count,
        "gradient_ms": statistics.median(gradient),
        "rows": {
            name: {
                "ms": medians[name],
                "rounds_ms": times[name],
                "first_ms": first[name],
                "bytes_per_parameter": state_bytes(made[name]) / count,
            }
            for name in rows
        },
    }


def table(results: dict[str, Any]) -> str:
    models = results["models"]
    names = list(next(iter(models.values()))["rows"])
    lines = [
        f"# What a step costs on {len(models)} models",
        "",
        f"{results['machine']}, {results['threads']} thread(s), torch {results['torch']}, commit {results['commit']}. "
        f"`{results['command']}`: medians of {results['rounds']} rounds of {STEPS} steps each, processor time.",
        "",
        "Milliseconds of a step; in brackets times fused Adam's, and the share of a training step.",
        "",
        "| model | forward and backward | " + " | ".join(names) + " |",
        "|---|--:|" + "--:|" * len(names),
    ]
    for model, found in models.items():
        base, gradient = found["rows"][names[0]]["ms"], found["gradient_ms"]
        cells = [
            f"{row['ms']:.3g} ({row['ms'] / base:.2g}×, {100 * row['ms'] / (row['ms'] + gradient):.0f} %)"
            for row in found["rows"].values()
        ]
        lines.append(f"| {model} | {gradient:.3g} | " + " | ".join(cells) + " |")
    for title, key, form in (
        ("The first step, over the median later one.", "first_ms", "{:.2g}"),
        ("State, bytes per parameter.", "bytes_per_parameter", "{:.3g}"),
    ):
        lines += ["", title, "", "| model | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
        for model, found in models.items():
            cells = [
                form.format(row[key] / row["ms"] if key == "first_ms" else row[key]) for row in found["rows"].values()
            ]
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    means = {
        name: math.exp(
            statistics.fmean(
                math.log(found["rows"][name]["ms"] / found["rows"][names[0]]["ms"]) for found in models.values()
            )
        )
        for name in names
    }
    lines += [
        "",
        "Geometric means over models, times fused Adam: "
        + ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_share"), help="without an ending")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="the smallest model once; writes nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = optimizers()
    names = arguments.models[:1] if arguments.quick else arguments.models
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/step_share.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": source_commit(),
        "learnedopt": learnedopt.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": arguments.threads,
        "rounds": 1 if arguments.quick else arguments.rounds,
        "models": {},
    }
    for name in names:
        results["models"][name] = measure(MODELS[name], rows, results["rounds"])
        print(table({**results, "models": {name: results["models"][name]}}).splitlines()[8], flush=True)
    if not arguments.quick:
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
