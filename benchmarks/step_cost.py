"""What a step costs: time, state and memory, beside Adam and a naive implementation of the same LSTM optimizer.

    python benchmarks/step_cost.py            # as published; takes a while, on a machine that does nothing else
    python benchmarks/step_cost.py --quick    # everything once, on small sizes

Rows are ``torch.optim.Adam`` in its three implementations, an LSTM optimizer as one would write it first
(``nn.LSTMCell`` over a batch of coordinates, and the same in chunks), and ``LearnedOptimizer`` with each backend that
serves here and each way to keep state, for the 2×20 LSTM and for the rule `light`. PyLO's optimizers join in where it
can be imported. Everything runs in one process. Repeats are interleaved, each row once in every round, and the median
over rounds is what is given. A model's many tensors take turns with one tensor of the same size, row by row.

*Time* is that of ``step()`` alone, per parameter; gradients are there already. *State* is the bytes of
``optimizer.state`` per parameter. *Extra memory* is the most that torch's allocator held during a step beyond what it
held before. *Share of the floor* is the time that the machine would need for a step's multiplications at the speed of
its matrix products, or to read and write parameters, gradients and state at the speed of its memory, whichever is
longer, over the time it took. Both speeds are measured in the same run: a product of two 2048 x 2048 matrices, and a
copy of 512 MiB.

The last table is whole training steps: forward, backward and ``step()`` of four models, the optimizer's share, and its
extra memory. It has the default rule too, whose step depends on the shapes of the tensors: the mean of ten steps, at
one of which bases follow. The fourth model is there for a matrix of which one side is long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import learnedopt
from learnedopt.kernels import Case, choose, get_backend
from learnedopt.optim import LearnedOptimizer
from learnedopt.rules import LSTMRule, UpdateRule, log_sign
from learnedopt.runs import source_commit
from learnedopt.zoo import load_rule

K = TypeVar("K")
Shapes = list[tuple[int, ...]]
STEPS_OF_DEFAULT = 10
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
MULTIPLICATIONS = {"lstm": LSTMRule, "light": lambda: load_rule("light")}


# What is compared --------------------------------------------------------------------------------------------------


class NaiveLSTM(Optimizer):
    """The 2×20 LSTM optimizer as it is usually written: coordinates are the batch of two ``nn.LSTMCell``s."""

    def __init__(self, params: Sequence[Tensor], chunk: int | None = None) -> None:
        super().__init__(params, {})
        device = params[0].device
        self.cells = [nn.LSTMCell(2, 20, device=device), nn.LSTMCell(20, 20, device=device)]
        self.readout = nn.Linear(20, 1, device=device)
        self.chunk = chunk

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                for name in ("h0", "c0", "h1", "c1"):
                    state[name] = torch.zeros(param.numel(), 20, device=param.device)
            flat, grad = param.view(-1), param.grad.view(-1)
            size = self.chunk or len(flat)
            for start in range(0, len(flat), size):
                part = slice(start, start + size)
                x = log_sign(grad[part]).T
                for layer, cell in enumerate(self.cells):
                    h, c = (state[f"{name}{layer}"] for name in "hc")
                    h[part], c[part] = cell(x, (h[part], c[part]))
                    x = h[part]
                flat[part] += 0.1 * self.readout(x).squeeze(1)


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[Sequence[Tensor]], Optimizer]
    rule: str | None = None
    """``"lstm"`` or ``"light"``, for the floor."""
    largest: float = math.inf
    """Not run on more parameters than this."""


def rows(device: torch.device) -> list[Row]:
    found = [
        Row("Adam, for loop", lambda params: Adam(params, foreach=False)),
        Row("Adam, foreach", lambda params: Adam(params, foreach=True)),
        Row("Adam, fused", lambda params: Adam(params, fused=True)),
        Row("naive nn.LSTMCell", NaiveLSTM, "lstm", largest=1.5e6),
        Row("naive, chunks of 4096", lambda params: NaiveLSTM(params, 4096), "lstm", largest=1.5e6),
    ]
    for rule_name, make_rule in MULTIPLICATIONS.items():
        rule = make_rule()
        for backend in ("reference", "blocked", "native", "triton"):
            case = Case(rule, device, torch.float32, "float32")
            if get_backend(backend).refusal(case):
                continue
            choose(case, backend)  # compile it now
            vectors = any(spec.shape for spec in rule.state_spec().values())
            for state_dtype in STATE_DTYPES if vectors else STATE_DTYPES[:1]:  # numbers are kept as they are
                name = f"{rule_name}, {backend}, {str(state_dtype).removeprefix('torch.')}"
                found.append(Row(name, learned(rule, backend, state_dtype), rule_name))
    return found + pylo_rows()


def learned(rule: UpdateRule, backend: Any, state_dtype: torch.dtype) -> Callable[[Sequence[Tensor]], Optimizer]:
    return lambda params: LearnedOptimizer(params, rule, backend=backend, state_dtype=state_dtype)


def pylo_rows() -> list[Row]:
    """PyLO's optimizers that can be constructed here, which downloads their weights, and whose step needs no loss."""
    try:
        pylo = importlib.import_module("pylo.optim")
    except ImportError:
        return []
    found = []
    for name in ("AdafacLO_naive", "ELO_naive", "CELO2_naive"):
        try:
            make = getattr(pylo, name)
            make([torch.zeros(2, requires_grad=True)])
        except Exception as error:  # whatever it is that is missing
            print(f"PyLO's {name} is left out: {error}")
        else:
            found.append(Row(f"PyLO {name}", make))
    return found


# Where it is compared ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.into(self.first(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """A small language model of bytes."""

    def __init__(self, width: int = 256, depth: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Attention(width, 4) for _ in range(depth)), nn.LayerNorm(width))
        self.logits = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]]))


class Bigrams(nn.Module):
    """What follows a word, by its embedding alone; the read-out has the same weights."""

    def __init__(self, words: int = 50257, width: int = 384) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embedding(x), self.embedding.weight)


def resnet18() -> nn.Module:
    from torchvision import models

    net: nn.Module = models.resnet18()
    return net


def shapes_of(net: nn.Module) -> Shapes:
    return [tuple(param.shape) for param in net.parameters()]


def layouts(sizes: Sequence[int], models: bool) -> list[dict[str, Shapes]]:
    """Lists of shapes, in groups to be timed together: each model with one tensor of its size."""
    found: list[dict[str, Shapes]] = [{f"one tensor, {size:.0e}": [(size,)]} for size in sizes]
    if models:
        for name, make in (("transformer", Transformer), ("ResNet-18", resnet18)):
            with torch.device("meta"):
                shapes = shapes_of(make())
            found.append({name: shapes, single(name): [(sum(math.prod(shape) for shape in shapes),)]})
    return found


def single(model: str) -> str:
    """The layout that a model's is compared with."""
    return f"one tensor as large as {model}"


# Measuring ---------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def round_robin(works: dict[K, Callable[[], Any]], rounds: int, device: torch.device) -> dict[K, list[float]]:
    """Seconds of each, once in every round, so that what else the machine does hits all alike."""
    times: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def extra_memory(step: Callable[[], Any], device: torch.device) -> int:
    """The most that torch's allocator held during a step beyond what it held before."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    # In the order of time, which the flat list of events is not.
    for change in allocations(profile.profiler.kineto_results.experimental_event_tree()):
        held += change
        peak = max(peak, held)
    return peak


def allocations(events: Sequence[Any]) -> Iterator[int]:
    for event in events:
        if event.name == "[memory]":
            yield event.extra_fields.alloc_size
        yield from allocations(event.children)


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def speeds(device: torch.device) -> dict[str, float]:
    """Of float32 matrix products, in FLOP per second, and of memory, in bytes read and written per second."""
    a, b, c = (torch.randn(2048, 2048, device=device) for _ in range(3))
    source, target = (torch.zeros(2**27, device=device) for _ in range(2))
    works = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    times = round_robin(works, 10, device)
    return {
        "flop_per_second": 2 * 2048**3 / min(times["product"]),
        "bytes_per_second": 2 * source.numel() * 4 / min(times["copy"]),
    }


def floor(rule: str, size: int, state: int, speed: dict[str, float]) -> float:
    """Seconds a step takes at least, with ``state`` bytes of state."""
    weights = sum(weight.numel() for weight in MULTIPLICATIONS[rule]().parameters() if weight.dim() == 2)
    traffic = 2 * state + 3 * 4 * size
    return max(2 * weights * size / speed["flop_per_second"], traffic / speed["bytes_per_second"])


def measure(group: dict[str, Shapes], rounds: int, device: torch.device, speed: dict[str, float]) -> dict[str, Any]:
    """Every row on every layout of the group, layouts in turn within each round."""
    results: dict[str, Any] = {}
    for layout, shapes in group.items():
        size = sum(math.prod(shape) for shape in shapes)
        results[layout] = {"parameters": size, "tensors": len(shapes), "rows": {}}
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    for row in rows(device):
        if size > row.largest:
            continue
        for layout, shapes in group.items():
            params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer = row.make(params)
            optimizer.step()  # makes the state
            state = state_bytes(optimizer)
            results[layout]["rows"][row.name] = {
                "state_bytes_per_parameter": state / size,
                "extra_memory_bytes": extra_memory(optimizer.step, device),
                "floor_seconds": floor(row.rule, size, state, speed) if row.rule else None,
            }
            steps[layout, row.name] = optimizer.step
        if size * 400 > 1e9:  # too large to keep those of all rows: measured one row after the other
            record(results, round_robin(steps, rounds, device))
            steps.clear()
    record(results, round_robin(steps, rounds, device))
    return results


def record(results: dict[str, Any], times: dict[tuple[str, str], list[float]]) -> None:
    for (layout, row), found in times.items():
        ns = 1e9 * statistics.median(found) / results[layout]["parameters"]
        results[layout]["rows"][row] |= {"seconds": found, "ns_per_parameter": ns}


# Whole training steps ----------------------------------------------------------------------------------------------


def end_to_end(rounds: int, device: torch.device, quick: bool) -> dict[str, Any]:
    def image(batch: int, size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)

    def text() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(256, (8 if quick else 32, 129), device=device)
        return tokens[:, :-1], tokens[:, 1:]

    layers = [nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    models: dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]] = {
        "MLP 3072-512-512-10, batch 256": (nn.Sequential(nn.Flatten(), *layers), image(256, 32)),
        "transformer, batch 32 x 128": (Transformer(), text()),
    }
    if not quick:
        models["ResNet-18, batch 32 x 64 x 64"] = (resnet18(), image(32, 64))
        words = torch.randint(50257, (8, 129), device=device)
        models["embedding 50,257 x 384, batch 8 x 128"] = (Bigrams(), (words[:, :-1], words[:, 1:]))
    results: dict[str, Any] = {}
    for name, (net, (x, y)) in models.items():
        net.to(device)

        def gradients(net: nn.Module = net, x: Tensor = x, y: Tensor = y) -> None:
            net.zero_grad()
            F.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()

        gradients()
        # Each moves copies of the parameters: the model whose gradients are timed stays the same.
        steps: dict[str, Callable[[], Any]] = {}
        memory: dict[str, int] = {}
        chosen = "auto"
        optimizers = {
            "Adam, fused": lambda params: Adam(params, fused=True),
            "light": learned(load_rule("light"), chosen, torch.float32),
            "default": learned(load_rule("default"), chosen, torch.float32),
            "lstm": learned(LSTMRule(), chosen, torch.float32),
            "lstm, blocked": learned(LSTMRule(), "blocked" if device.type == "cpu" else chosen, torch.float32),
        }
        for optimizer_name, make in optimizers.items():
            params = [param.detach().clone().requires_grad_() for param in net.parameters()]
            for param, other in zip(params, net.parameters()):
                assert other.grad is not None
                param.grad = other.grad.clone()
            optimizer = make(params)
            optimizer.step()
            name_and_backend = optimizer_name
            if isinstance(optimizer, LearnedOptimizer):
                name_and_backend = f"{optimizer_name.split(',')[0]}, {optimizer.backend}"
            steps[name_and_backend] = optimizer.step
            if optimizer_name == "default":
                # Its bases follow in the first ten steps and in every tenth: ten at a time, once the first are over.
                several(optimizer.step)
                steps[name_and_backend] = partial(several, optimizer.step)
            memory[name_and_backend] = extra_memory(steps[name_and_backend], device)
        times = round_robin({"forward and backward": gradients, **steps}, rounds, device)
        times = {
            key: [each / STEPS_OF_DEFAULT for each in values] if key.startswith("default") else values
            for key, values in times.items()
        }
        model = statistics.median(times["forward and backward"])
        results[name] = {
            "parameters": sum(param.numel() for param in net.parameters()),
            "seconds": times,
            "extra_memory_bytes": memory,
            "share": {
                step: statistics.median(times[step]) / (model + statistics.median(times[step])) for step in steps
            },
        }
    return results


def several(step: Callable[[], Any]) -> None:
    for _ in range(STEPS_OF_DEFAULT):
        step()


# Reporting ---------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    speed = results["speeds"]
    lines = [
        f"Matrix products {speed['flop_per_second'] / 1e9:.0f} GFLOP/s, memory {speed['bytes_per_second'] / 1e9:.1f} "
        f"GB/s, {results['threads']} threads, torch {results['torch']}, {results['machine']}; medians of "
        f"{results['rounds']} rounds.",
        "",
    ]
    for layout, result in results["steps"].items():
        lines += [
            f"## {layout}: {result['parameters']:,} parameters in {result['tensors']} tensor(s)",
            "",
            "| optimizer | ns per parameter | this / one tensor | naive / this | this / fused Adam | "
            "state, B per parameter | extra memory, MiB | share of the floor |",
            "|---|---|---|---|---|---|---|---|",
        ]
        one = results["steps"].get(single(layout))
        adam = result["rows"]["Adam, fused"]["ns_per_parameter"]
        naive = result["rows"].get("naive nn.LSTMCell", {}).get("ns_per_parameter")
        for name, row in result["rows"].items():
            ns, least = row["ns_per_parameter"], row["floor_seconds"]
            share = "" if least is None else f"{1e11 * least / result['parameters'] / ns:.0f} %"
            cells = [
                name,
                f"{ns:.3g}",
                "" if one is None else f"{ns / one['rows'][name]['ns_per_parameter']:.2f}",
                "" if naive is None else f"{naive / ns:.2g}",
                f"{ns / adam:.2g}",
                f"{row['state_bytes_per_parameter']:.1f}",
                f"{row['extra_memory_bytes'] / 2**20:.2f}",
                share,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "## Whole training steps",
        "",
        "| model | optimizer | step, ms | share of the whole | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for model, result in results["end_to_end"].items():
        for name, share in result["share"].items():
            step = 1e3 * statistics.median(result["seconds"][name])
            extra = result["extra_memory_bytes"][name] / 2**20
            lines.append(f"| {model} | {name} | {step:.3g} | {100 * share:.1f} % | {extra:.2f} |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 6))
    lone = [result for result in results["steps"].values() if result["tensors"] == 1]
    lone.sort(key=lambda result: result["parameters"])
    for name in dict.fromkeys(name for result in lone for name in result["rows"]):
        points = [
            (result["parameters"], statistics.median(result["rows"][name]["seconds"]))
            for result in lone
            if name in result["rows"]
        ]
        style = ":" if name.startswith("Adam") else "--" if name.startswith("naive") else "-"
        axes.plot(*zip(*points), style, marker=".", label=name)
    axes.set(xscale="log", yscale="log", xlabel="parameters, one tensor", ylabel="seconds per step")
    axes.legend(fontsize=6, ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--largest",
        type=int,
        metavar="POWER",
        help="10 to this power is the most parameters (7; 8 on CUDA); below 7 the models are left out",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and three rounds: to see that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file; a table and a picture are written beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds = 3 if args.quick else args.rounds
    largest = args.largest or (5 if args.quick else 8 if args.device.type == "cuda" else 7)
    out = args.out or Path(f"benchmarks/results/step_cost_{args.device.type}{'_quick' if args.quick else ''}.json")
    speed = speeds(args.device)
    results: dict[str, Any] = {
        "learnedopt": learnedopt.__version__,
        "commit": source_commit(),
        "torch": str(torch.__version__),
        "machine": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine(),
        "threads": args.threads,
        "rounds": rounds,
        "speeds": speed,
        "steps": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for group in layouts([10**power for power in range(4, largest + 1)], models=largest > 6):
        results["steps"] |= measure(group, rounds, args.device, speed)
        for name in group:
            rows = {key: round(row["ns_per_parameter"], 2) for key, row in results["steps"][name]["rows"].items()}
            print(name, rows, flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")  # a long run that is cut short leaves what it has
    results["end_to_end"] = end_to_end(rounds, args.device, args.quick)
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(report(results))
    picture(results, out.with_suffix(".png"))
    print(report(results))


if __name__ == "__main__":
    main()
