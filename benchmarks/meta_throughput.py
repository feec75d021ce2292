"""How fast meta-gradients are, beside what one would write without this package.

Run: ``python benchmarks/meta_throughput.py`` (``--quick`` for a look, ``--device cuda`` on a GPU). It writes
``benchmarks/results/meta_throughput.json`` and ``.md``.

One meta-gradient is one window of 20 inner steps of the two-layer, 20-unit LSTM optimizer on a batch of tasks, forward
and backward, gradients of the optimizee as constants. All rows compute the same one, from the same weights, tasks and
batches, which is checked before anything is timed:

* ``published loop``: how the open reproductions in PyTorch are written: tasks one after another, parameters one after
  another, ``nn.LSTMCell`` on each, and the optimizee's gradients from ``loss.backward(retain_graph=True)``, which walks
  back through all earlier steps of the window each time.
* ``loop``: the same, but for gradients that stop at the parameters: what its authors might do about it.
* ``vmap``: ``vmap(grad(loss))`` over the tasks, all coordinates in one ``nn.LSTMCell``.
* ``engine``: this package, ``backend="reference"``; ``engine, states only`` with ``recompute``.
* ``engine, compiled``: this package, ``backend="compiled"``: ``torch.compile``, on CUDA with captured graphs.
* ``engine, native``: this package, ``backend="native"``, on the CPU. Compiling is not part of the times; what it takes
  is stated: for ``native`` once per machine, for ``compiled`` in every process.

Times are medians of interleaved repeats in one process; ratios are medians of the ratios within each repeat. Peak
memory is by how much the process grows over one window, each row in a process of its own. Where only shapes matter
the tasks stand in for their data: the network's images are noise of the size of MNIST's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from learnedopt.data import ImageData
from learnedopt.kernels.core import extension
from learnedopt.kernels.lstm_training import fused
from learnedopt.meta import Episode, MetaObjective, TruncatedBPTT, start_episode
from learnedopt.meta.backends import compiled
from learnedopt.rules import LSTMConfig, LSTMRule, UpdateRule, log_sign
from learnedopt.tasks import Batch, MLPClassification, Quadratics, TaskFamily

RESULTS = Path(__file__).parent / "results"
STEPS = 20
OBJECTIVE = MetaObjective("loss")
Run = Callable[[], Tensor]


class CellOptimizer(nn.Module):
    """The same LSTM optimizer from ``nn.LSTMCell``, coordinates first, as it is usually written."""

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__()
        hidden, lstm = rule.config.hidden_size, rule.lstm
        self.scale, self.p = rule.config.output_scale, rule.config.preprocessing_p
        self.cells = nn.ModuleList([nn.LSTMCell(2, hidden), nn.LSTMCell(hidden, hidden)])
        self.readout = nn.Linear(hidden, 1)
        with torch.no_grad():
            for cell, w, r, b in zip(self.cells, lstm.input_weights, lstm.recurrent_weights, lstm.biases):
                assert isinstance(cell, nn.LSTMCell)
                cell.weight_ih.copy_(w)
                cell.weight_hh.copy_(r)
                cell.bias_ih.copy_(b)
                cell.bias_hh.zero_()
            self.readout.load_state_dict(rule.readout.state_dict())
        self.to(next(rule.parameters()).device)

    def start(self, coordinates: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        zeros = like.new_zeros(coordinates, self.readout.in_features)
        return [(zeros, zeros) for _ in self.cells]

    def forward(self, grad: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, after = log_sign(grad, self.p).T, []
        for cell, memory in zip(self.cells, state):
            after.append(cell(x, memory))
            x = after[-1][0]
        return self.scale * self.readout(x).squeeze(1), after

    def gradient(self, loss: Tensor) -> Tensor:
        """In the order of the rule's parameters; the second bias of a cell is not one of them."""
        first, second = self.cells
        assert isinstance(first, nn.LSTMCell)
        assert isinstance(second, nn.LSTMCell)
        wanted = [first.weight_ih, second.weight_ih, first.weight_hh, second.weight_hh, first.bias_ih, second.bias_ih]
        wanted += [self.readout.weight, self.readout.bias]
        # The second biases take part in the backward pass as they would in any training.
        extra = [first.bias_hh, second.bias_hh]
        grads = torch.autograd.grad(loss, [*wanted, *extra])
        return torch.cat([grad.flatten() for grad in grads[: len(wanted)]])


def loop(optimizer: CellOptimizer, episode: Episode, batches: list[Batch]) -> Tensor:
    """One task after another, one tensor after another."""
    total: Any = 0.0
    for copy in range(len(episode.theta)):
        params = {name: value.clone() for name, value in episode.flat.unflatten(episode.theta[copy]).items()}
        states = {name: optimizer.start(value.numel(), value) for name, value in params.items()}
        grads = episode.flat.unflatten(episode.grad[copy])
        for batch in batches:
            moved = {}
            for name, value in params.items():
                delta, states[name] = optimizer(grads[name].flatten(), states[name])
                moved[name] = value + delta.view_as(value)
            params = moved
            loss = episode.flat.task.loss(params, tuple(item[copy] for item in batch))
            total = total + loss
            found = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            grads = {name: grad.detach() for name, grad in zip(params, found)}
    return optimizer.gradient(total / (len(batches) * len(episode.theta)))


def published_loop(optimizer: CellOptimizer, episode: Episode, batches: list[Batch]) -> Tensor:
    """The same, with ``backward`` for the optimizee's gradients: it goes on into the steps before."""
    total: Any = 0.0
    for copy in range(len(episode.theta)):
        flat = episode.flat.unflatten(episode.theta[copy])
        params = {name: value.clone().requires_grad_() for name, value in flat.items()}
        states = {name: optimizer.start(value.numel(), value) for name, value in params.items()}
        grads = episode.flat.unflatten(episode.grad[copy])
        losses: Any = 0.0
        for batch in batches:
            moved = {}
            for name, value in params.items():
                delta, states[name] = optimizer(grads[name].flatten(), states[name])
                moved[name] = value + delta.view_as(value)
                moved[name].retain_grad()
            params = moved
            loss = episode.flat.task.loss(params, tuple(item[copy] for item in batch))
            losses = losses + loss
            loss.backward(retain_graph=True)
            grads = {}
            for name, value in params.items():
                assert value.grad is not None
                grads[name], value.grad = value.grad.detach(), None
        # The graph of this task is let go before the next begins, as where each is a step of training.
        total = total + optimizer.gradient(losses / (len(batches) * len(episode.theta)))
    optimizer.zero_grad()
    return total


def vmapped(optimizer: CellOptimizer, episode: Episode, batches: list[Batch]) -> Tensor:
    """All tasks at once."""
    flat = episode.flat

    def loss_of(theta: Tensor, batch: Batch) -> Tensor:
        return flat.task.loss(flat.unflatten(theta), batch)

    theta, grad = episode.theta, episode.grad
    state, total = optimizer.start(theta.numel(), theta), theta.new_zeros(())
    for batch in batches:
        delta, state = optimizer(grad.flatten(), state)
        theta = theta + delta.view_as(theta)
        total = total + torch.func.vmap(loss_of)(theta, batch).sum()
        grad = torch.func.vmap(torch.func.grad(loss_of))(theta.detach(), batch)
    return optimizer.gradient(total / (len(batches) * len(theta)))


def engine(rule: UpdateRule, episode: Episode, seed: int, recompute: bool = False, steps: int = STEPS) -> Tensor:
    generator = Generator().manual_seed(seed)
    estimator = TruncatedBPTT(recompute=recompute)
    return estimator.estimate(rule, episode, steps, generator, OBJECTIVE)[0].gradient


@dataclass(frozen=True)
class Problem:
    name: str
    family: TaskFamily
    tasks: int
    steps: int = STEPS


def noise_images() -> ImageData:
    """As many pixels as MNIST has, since nothing here depends on what they show."""
    generator = Generator().manual_seed(0)

    def split(count: int) -> tuple[Tensor, Tensor]:
        return torch.rand(count, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator)

    return ImageData("noise", 10, split(4096), split(256), split(256))


def problems() -> list[Problem]:
    network = MLPClassification(noise_images(), initial_std=None)
    return [Problem("quadratics", Quadratics(), 32), Problem("MNIST MLP", network, 8)]


def rows(rule: LSTMRule, problem: Problem, steps: int = STEPS) -> tuple[dict[str, Run], Episode]:
    """What is compared, each a function that computes the meta-gradient."""
    generator, seed = Generator().manual_seed(0), 1
    task = problem.family.draw(generator, problem.tasks)
    episode = start_episode(rule, task, generator)
    cells = CellOptimizer(rule)

    def batches() -> list[Batch]:
        draws = Generator().manual_seed(seed)
        return [tuple(item.to(episode.theta.device) for item in task.sample(draws)) for _ in range(steps)]

    found: dict[str, Run] = {
        "published loop": lambda: published_loop(cells, episode, batches()),
        "loop": lambda: loop(cells, episode, batches()),
        "vmap": lambda: vmapped(cells, episode, batches()),
        "engine": lambda: engine(rule, episode, seed),
        "engine, states only": lambda: engine(rule, episode, seed, recompute=True),
    }
    if extension.why_unavailable() is None or episode.theta.device.type == "cuda":
        graph = compiled(rule)
        found["engine, compiled"] = lambda: engine(graph, episode, seed)
    if episode.theta.device.type == "cpu" and extension.why_unavailable() is None:
        fast = fused(rule)
        found["engine, native"] = lambda: engine(fast, episode, seed)
    return found, episode


def peak_bytes(run: Run) -> int:
    """By how much the memory in use rises at most while it runs, on the device it runs on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no more
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def peaks(problem: Problem, names: list[str], device: torch.device) -> dict[str, int | None]:
    """Each in a process of its own, since the most that a process ever used cannot be reset."""
    if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(names)
    found: dict[str, int | None] = {}
    for name in names:
        command = [sys.executable, __file__, "--device", str(device), "--peak", problem.name, name]
        found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def seconds(run: Run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(rule: LSTMRule, problem: Problem, repeats: int) -> dict[str, Any]:
    runs, episode = rows(rule, problem)
    truth, first = runs["engine"](), {}
    for name, run in runs.items():
        first[name] = seconds(run)
        torch.testing.assert_close(run(), truth, rtol=1e-3, atol=1e-5 * truth.abs().max().item(), msg=name)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    with FlopCounterMode(display=False) as counter:
        runs["engine"]()
    peak = peaks(problem, list(runs), episode.theta.device)
    return {
        "tasks": problem.tasks,
        "steps": STEPS,
        "coordinates per task": episode.theta.shape[1],
        "matrix FLOP per window": counter.get_total_flops(),
        "rows": {name: {"seconds": times[name], "first": first[name], "peak bytes": peak[name]} for name in runs},
    }


def scaling(rule: LSTMRule, repeats: int) -> list[dict[str, Any]]:
    """The engine's time over coordinates (more tasks) and over steps."""
    network, found = problems()[1], []
    backend = fused(rule) if extension.why_unavailable() is None else rule
    for tasks, steps in ((1, 20), (2, 20), (4, 20), (8, 20), (2, 10), (2, 40), (2, 80)):
        _, episode = rows(rule, replace(network, tasks=tasks))

        def window(episode: Episode = episode, steps: int = steps) -> Tensor:
            return engine(backend, episode, seed=1, steps=steps)

        window()
        times = [seconds(window) for _ in range(repeats)]
        found.append({"coordinates": episode.theta.numel(), "steps": steps, "seconds": times})
    return found


def compile_seconds() -> float | None:
    """Of the native kernels, from nothing, in a process of its own."""
    if extension.why_unavailable() is not None:
        return None
    code = "from learnedopt.kernels.core import extension as x; assert x.why_unavailable() is None; x.operators()"
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": folder}
        timings = []
        for _ in range(2):  # the second finds them compiled
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            timings.append(time.perf_counter() - started)
    return timings[0] - timings[1]


def report(result: dict[str, Any]) -> str:
    lines = [
        "# Meta-gradients per second",
        "",
        "Made by `benchmarks/meta_throughput.py`, whose docstring says what the rows are. Two-layer LSTM optimizer of",
        f"20 units, windows of {STEPS} steps, forward and backward. {result['device']}, {result['threads']} thread(s),",
        f"torch {result['torch']}. Medians of {result['repeats']} interleaved repeats.",
    ]
    for name, problem in result["problems"].items():
        lines += [
            "",
            f"## {name}: {problem['tasks']} tasks of {problem['coordinates per task']} coordinates",
            "",
            "| | s per window | tasks × inner steps / s | against published loop | loop | vmap | peak memory |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        base = problem["rows"]
        for row, values in base.items():
            middle = statistics.median(values["seconds"])
            ratios = [
                statistics.median(theirs / ours for theirs, ours in zip(base[other]["seconds"], values["seconds"]))
                for other in ("published loop", "loop", "vmap")
            ]
            peak = values["peak bytes"]
            memory = "" if peak is None else f"{peak / 1e6:.0f} MB"
            lines.append(
                f"| {row} | {middle:.3f} | {problem['tasks'] * STEPS / middle:,.0f} | {ratios[0]:.1f}× | "
                f"{ratios[1]:.1f}× | {ratios[2]:.1f}× | {memory} |"
            )
        best = min(statistics.median(values["seconds"]) for values in base.values())
        speed = problem["matrix FLOP per window"] / best / 1e9
        lines += [
            "",
            f"The matrix products of a window are {problem['matrix FLOP per window'] / 1e9:.2f} GFLOP, in the fastest",
            f"row {speed:.0f} GFLOP/s. At the {result['matmul GFLOP/s']:.0f} GFLOP/s of a large fp32 matrix product",
            f"they would take {100 * speed / result['matmul GFLOP/s']:.0f} % of its time.",
        ]
        if "engine, compiled" in base:
            lines.append(f"The first window of *engine, compiled* took {base['engine, compiled']['first']:.0f} s.")
    lines += ["", "## Cost over size", ""]
    lines += ["| coordinates | steps | s | ns per coordinate and step |", "|--:|--:|--:|--:|"]
    for point in result["scaling"]:
        middle = statistics.median(point["seconds"])
        each = 1e9 * middle / point["coordinates"] / point["steps"]
        lines.append(f"| {point['coordinates']:,} | {point['steps']} | {middle:.3f} | {each:.0f} |")
    if result["compile seconds"] is not None:
        lines += ["", f"Compiling the native kernels, once per machine: {result['compile seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def random_rule(device: torch.device) -> LSTMRule:
    torch.manual_seed(0)
    rule = LSTMRule(LSTMConfig())
    with torch.no_grad():
        rule.readout.weight.normal_(std=0.1)
    return rule.to(device)


def matmul_speed(device: torch.device) -> float:
    a, b = torch.rand(1024, 1024, device=device), torch.rand(1024, 1024, device=device)
    times = [seconds(lambda: a @ b) for _ in range(20)]
    return 2 * 1024**3 / statistics.median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two repeats, and nothing is written")
    parser.add_argument("--peak", nargs=2, metavar=("PROBLEM", "ROW"), help="print the peak memory of one row")
    arguments = parser.parse_args()
    device, repeats = torch.device(arguments.device), 2 if arguments.quick else arguments.repeats
    rule = random_rule(device)
    if arguments.peak:
        problem = next(problem for problem in problems() if problem.name == arguments.peak[0])
        runs, _ = rows(rule, problem)
        print(peak_bytes(runs[arguments.peak[1]]))
        return
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "repeats": repeats,
        "matmul GFLOP/s": matmul_speed(device),
        "problems": {problem.name: measure(rule, problem, repeats) for problem in problems()},
        "scaling": scaling(rule, repeats),
        "compile seconds": compile_seconds() if device.type == "cpu" else None,
    }
    text = report(result)
    print(text)
    if not arguments.quick:
        suffix = "" if device.type == "cpu" else f"_{device.type}"
        (RESULTS / f"meta_throughput{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"meta_throughput{suffix}.md").write_text(text)


if __name__ == "__main__":
    main()
