"""How long a step of meta-training takes, beside the same step in other libraries and written by hand.

Run: ``OMP_NUM_THREADS=1 python benchmarks/fewshot_speed.py`` (``--quick`` for a look). It writes
``benchmarks/results/fewshot_speed.json`` and ``.md``. Rows of libraries that are not installed are left out
(``pip install higher TorchOpt easyfsl``; learn2learn 0.2.0 must be built from its source distribution with a current
Cython: ``python setup.py build_ext --inplace``).

One step is the meta-loss of a batch of episodes and its gradient; drawing episodes and the outer optimizer are not in
it. All rows get the same network with the same weights, and the same tensors. Before anything is timed, each row's loss
and gradient on two of the episodes are compared with the hand-written loop's in float64, and the report says where they
differ:

* ``loop by hand``: one episode after another, ``torch.autograd.grad`` and ``functional_call``.
* ``vmap by hand``: ``torch.func.vmap`` over episodes of ``torch.func.grad``, as in torch's own MAML example.
* ``learnedopt``: this package as it comes. ``one by one`` and ``all at once`` force ``episodes_at_once``.
* ``learn2learn``: ``MAML.clone``, ``adapt``; prototypes with ``PrototypicalClassifier``.
* ``higher``: ``innerloop_ctx`` with ``torch.optim.SGD``.
* ``TorchOpt``: ``MetaSGD`` on the module, episode by episode; ``TorchOpt, vmap`` its functional ``sgd`` under ``vmap``.
* ``easyfsl``: ``PrototypicalNetworks``. It takes distances without squaring them and normalizes support and queries
  apart, so that its loss is another one.

Times are medians of interleaved repeats in one process: CPU seconds of the process, and wall-clock seconds. Ratios are
medians of the ratios within each repeat. Peak memory is by how much the process grows over one step, each row in a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learnedopt.fewshot import Conv4, Episodes, LearnerConfig, LearnerShape, Sinusoid
from learnedopt.fewshot.backbones import MLP, BackboneConfig
from learnedopt.fewshot.fast.batch_norm import batch_norm
from learnedopt.fewshot.fast.convolution import Geometry, convolution
from learnedopt.fewshot.learners import MAMLConfig, ProtoNetConfig

RESULTS = Path(__file__).parent / "results"
LIBRARIES = {"learn2learn": "learn2learn", "higher": "higher", "TorchOpt": "torchopt", "easyfsl": "easyfsl"}
Step = Callable[[], tuple[Tensor, list[Tensor]]]
"""The meta-loss and its gradient with respect to the network's parameters."""


@dataclass(frozen=True)
class Problem:
    name: str
    method: str
    backbone: BackboneConfig
    episodes: Episodes
    outputs: int
    steps: int = 1
    rate: float = 0.01
    first_order: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.episodes.support_x.dtype

    def double(self) -> Problem:
        """Two of the episodes, in float64."""
        two = next(iter(self.episodes.batches(2)))
        return dataclasses.replace(self, episodes=two.to(torch.device("cpu"), torch.float64))

    def network(self) -> nn.Sequential:
        """The same weights every time, in plain modules."""
        torch.manual_seed(0)
        backbone = self.backbone.build(self.episodes.example_shape)
        width = backbone(self.episodes.support_x[0].float()).shape[1]
        head = nn.Linear(width, self.outputs) if self.method == "maml" else nn.Identity()
        return nn.Sequential(backbone, head).to(self.dtype)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)

    def each(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        e = self.episodes
        return list(zip(e.support_x, e.support_y, e.query_x, e.query_y))


def images(count: int, ways: int, shots: int, queries: int) -> Episodes:
    """Noise of the size of Omniglot's images: the time depends on shapes alone."""
    draws = Generator().manual_seed(0)

    def part(examples: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(ways).repeat_interleave(examples).expand(count, -1)
        return torch.rand(count, ways * examples, 1, 28, 28, generator=draws), labels

    return Episodes(*part(shots), *part(queries), ways)


def problems() -> list[Problem]:
    sines = Sinusoid(shots=10, queries=10).sample(25, Generator().manual_seed(0))
    digits = images(8, ways=5, shots=1, queries=5)
    conv = Conv4(64)
    return [
        Problem("sinusoid, MAML, 25 tasks, 10 shots, 1 step", "maml", MLP(), sines, 1),
        Problem("sinusoid, MAML, 25 tasks, 10 shots, 5 steps", "maml", MLP(), sines, 1, steps=5),
        Problem("Conv4-64, MAML, 8 tasks, 5-way 1-shot, 1 step", "maml", conv, digits, 5, rate=0.4),
        Problem(
            "Conv4-64, first-order MAML, 8 tasks, 5-way 1-shot, 1 step",
            "maml",
            conv,
            digits,
            5,
            rate=0.4,
            first_order=True,
        ),
        Problem(
            "Conv4-64 with strides, MAML, 16 tasks, 5-way 1-shot, 1 query, 1 step",
            "maml",
            Conv4(64, downsample="stride"),
            images(16, ways=5, shots=1, queries=1),
            5,
            rate=0.4,
        ),
        Problem(
            "Conv4-64 with strides, MAML, 2 tasks, 20-way 5-shot, 5 steps",
            "maml",
            Conv4(64, downsample="stride"),
            images(2, ways=20, shots=5, queries=5),
            20,
            steps=5,
            rate=0.02,
        ),
        Problem("Conv4-64, ProtoNet, 8 tasks, 5-way 1-shot", "protonet", conv, digits, 0),
    ]


def gradients(network: nn.Module) -> list[Tensor]:
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters()]
    network.zero_grad()
    return found


def ours(problem: Problem, episodes_at_once: int | None = None) -> Step:
    config: LearnerConfig
    if problem.method == "maml":
        config = MAMLConfig(
            adapted="all",
            steps=problem.steps,
            learning_rate=problem.rate,
            inner_loss="mean",
            first_order=problem.first_order,
            episodes_at_once=episodes_at_once,
        )
    else:
        config = ProtoNetConfig(episodes_at_once=episodes_at_once)
    learner = config.build(problem.network()[0], LearnerShape(problem.episodes.example_shape, problem.episodes.ways))
    learner.to(problem.dtype)
    weights = problem.network().parameters()
    with torch.no_grad():
        for mine, weight in zip(learner.parameters(), weights):
            mine.copy_(weight)

    def step() -> tuple[Tensor, list[Tensor]]:
        loss = learner.meta_loss(problem.episodes)
        loss.backward()
        return loss.detach(), gradients(learner)

    return step


def maml_loop(problem: Problem) -> Step:
    network = problem.network()

    def step() -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=problem.dtype)
        for support_x, support_y, query_x, query_y in problem.each():
            params: dict[str, Tensor] = dict(network.named_parameters())
            for _ in range(problem.steps):
                loss = problem.loss(torch.func.functional_call(network, params, (support_x,)), support_y)
                found = torch.autograd.grad(loss, list(params.values()), create_graph=not problem.first_order)
                params = {name: params[name] - problem.rate * grad for name, grad in zip(params, found)}
            loss = problem.loss(torch.func.functional_call(network, params, (query_x,)), query_y)
            (loss / len(problem.episodes)).backward()
            total += loss.detach() / len(problem.episodes)
        return total, gradients(network)

    return step


def maml_vmap(problem: Problem) -> Step:
    network = torch.func.replace_all_batch_norm_modules_(problem.network())

    def inner(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(torch.func.functional_call(network, params, (x,)), y)

    def task(params: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = tensors
        for _ in range(problem.steps):
            grads = torch.func.grad(inner)(params, support_x, support_y)
            params = {
                name: value - problem.rate * (grads[name].detach() if problem.first_order else grads[name])
                for name, value in params.items()
            }
        return inner(params, query_x, query_y)

    e = problem.episodes

    def step() -> tuple[Tensor, list[Tensor]]:
        params: dict[str, Tensor] = dict(network.named_parameters())
        losses = torch.func.vmap(task, in_dims=(None, 0, 0, 0, 0))(
            params, e.support_x, e.support_y, e.query_x, e.query_y
        )
        losses.mean().backward()
        return losses.mean().detach(), gradients(network)

    return step


def maml_learn2learn(problem: Problem) -> Step:
    learn2learn = importlib.import_module("learn2learn")

    network = problem.network()
    maml = learn2learn.algorithms.MAML(network, lr=problem.rate, first_order=problem.first_order)

    def step() -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=problem.dtype)
        for support_x, support_y, query_x, query_y in problem.each():
            learner = maml.clone()
            for _ in range(problem.steps):
                learner.adapt(problem.loss(learner(support_x), support_y))
            loss = problem.loss(learner(query_x), query_y) / len(problem.episodes)
            loss.backward()
            total += loss.detach()
        return total, gradients(network)

    return step


def maml_higher(problem: Problem) -> Step:
    higher = importlib.import_module("higher")

    network = problem.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=problem.rate)

    def step() -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=problem.dtype)
        for support_x, support_y, query_x, query_y in problem.each():
            with higher.innerloop_ctx(
                network, optimizer, copy_initial_weights=False, track_higher_grads=not problem.first_order
            ) as (fast, inner):
                for _ in range(problem.steps):
                    inner.step(problem.loss(fast(support_x), support_y))
                loss = problem.loss(fast(query_x), query_y) / len(problem.episodes)
                loss.backward()
                total += loss.detach()
        return total, gradients(network)

    return step


def maml_torchopt(problem: Problem) -> Step:
    torchopt = importlib.import_module("torchopt")

    network = problem.network()
    optimizer = torchopt.MetaSGD(network, lr=problem.rate)

    def step() -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=problem.dtype)
        start = torchopt.extract_state_dict(network, by="reference")
        start_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
        for support_x, support_y, query_x, query_y in problem.each():
            for _ in range(problem.steps):
                optimizer.step(problem.loss(network(support_x), support_y))
            loss = problem.loss(network(query_x), query_y) / len(problem.episodes)
            loss.backward()
            total += loss.detach()
            torchopt.recover_state_dict(network, start)
            torchopt.recover_state_dict(optimizer, start_optimizer)
        return total, gradients(network)

    return step


def maml_torchopt_vmap(problem: Problem) -> Step:
    torchopt = importlib.import_module("torchopt")

    network = torch.func.replace_all_batch_norm_modules_(problem.network())
    optimizer = torchopt.sgd(lr=problem.rate)

    def inner(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(torch.func.functional_call(network, params, (x,)), y)

    def task(params: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = tensors
        state = optimizer.init(params)
        for _ in range(problem.steps):
            grads = torch.func.grad(inner)(params, support_x, support_y)
            updates, state = optimizer.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return inner(params, query_x, query_y)

    e = problem.episodes

    def step() -> tuple[Tensor, list[Tensor]]:
        params: dict[str, Tensor] = dict(network.named_parameters())
        losses = torch.func.vmap(task, in_dims=(None, 0, 0, 0, 0))(
            params, e.support_x, e.support_y, e.query_x, e.query_y
        )
        losses.mean().backward()
        return losses.mean().detach(), gradients(network)

    return step


def protonet(problem: Problem, logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """``logits`` from features of support, labels and features of queries."""
    network = problem.network()

    def step() -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=problem.dtype)
        for support_x, support_y, query_x, query_y in problem.each():
            features = network(torch.cat([support_x, query_x]))
            support, query = features.split([len(support_x), len(query_x)])
            loss = F.cross_entropy(logits(support, support_y, query), query_y) / len(problem.episodes)
            loss.backward()
            total += loss.detach()
        return total, gradients(network)

    return step


def protonet_loop(problem: Problem) -> Step:
    ways = problem.episodes.ways
    assert ways is not None

    def logits(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        prototypes = torch.stack([support[labels == k].mean(0) for k in range(ways)])
        return -(query[:, None] - prototypes).square().sum(-1)

    return protonet(problem, logits)


def protonet_learn2learn(problem: Problem) -> Step:
    learn2learn = importlib.import_module("learn2learn")

    def logits(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        found: Tensor = learn2learn.nn.PrototypicalClassifier(support, labels)(query)
        return found

    return protonet(problem, logits)


def protonet_easyfsl(problem: Problem) -> Step:
    methods = importlib.import_module("easyfsl.methods")

    network = problem.network()
    model = methods.PrototypicalNetworks(network).train()

    def step() -> tuple[Tensor, list[Tensor]]:
        total = torch.zeros((), dtype=problem.dtype)
        for support_x, support_y, query_x, query_y in problem.each():
            model.process_support_set(support_x, support_y)
            loss = F.cross_entropy(model(query_x), query_y) / len(problem.episodes)
            loss.backward()
            total += loss.detach()
        return total, gradients(network)

    return step


def rows(problem: Problem) -> dict[str, Callable[[], Step]]:
    """What is compared; the hand-written loop first."""
    found: dict[str, Callable[[], Step]]
    if problem.method == "maml":
        found = {
            "loop by hand": lambda: maml_loop(problem),
            "vmap by hand": lambda: maml_vmap(problem),
            "learn2learn": lambda: maml_learn2learn(problem),
            "higher": lambda: maml_higher(problem),
            "TorchOpt": lambda: maml_torchopt(problem),
            "TorchOpt, vmap": lambda: maml_torchopt_vmap(problem),
        }
        if problem.first_order:  # TorchOpt's optimizers always differentiate twice
            found = {name: row for name, row in found.items() if not name.startswith("TorchOpt")}
    else:
        found = {
            "loop by hand": lambda: protonet_loop(problem),
            "learn2learn": lambda: protonet_learn2learn(problem),
            "easyfsl": lambda: protonet_easyfsl(problem),
        }
    found |= {
        "learnedopt": lambda: ours(problem),
        "learnedopt, one by one": lambda: ours(problem, 1),
        "learnedopt, all at once": lambda: ours(problem, len(problem.episodes)),
    }
    missing = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module) is None]
    return {name: row for name, row in found.items() if not name.startswith(tuple(missing) or ("/",))}


@dataclass(frozen=True)
class Time:
    cpu: float
    wall: float


def timed(step: Step, repeats: int) -> Time:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        step()
    return Time((time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats)


def measure(problem: Problem, repeats: int) -> dict[str, Any]:
    steps = {name: make() for name, make in rows(problem).items()}
    # Compared in float64, where no rounding pushes an activation over the kink of a ReLU.
    exact = {name: make() for name, make in rows(problem.double()).items()}
    loss, gradient = exact["loop by hand"]()
    scale = max(grad.abs().max().item() for grad in gradient)
    report: dict[str, Any] = {}
    for name in steps:
        its_loss, its_gradient = exact.pop(name)()
        worst = max((one - other).abs().max().item() for one, other in zip(gradient, its_gradient))
        report[name] = {
            "loss": its_loss.item(),
            "gradient off by": worst / scale,
            "same": abs(its_loss.item() - loss.item()) < 1e-6 and worst / scale < 1e-6,
            "peak bytes": peak(problem, name),
            "cpu": [],
            "wall": [],
        }
    inside = {name: max(1, round(0.05 / timed(step, 1).cpu)) for name, step in steps.items()}
    for repeat in range(repeats):
        # In another order every time, so that none always follows the same; and at other addresses, since how large
        # arrays are aligned to each other changes a row by several per cent.
        elsewhere = torch.ones(int(torch.randint(1, 2**20, (), generator=Generator().manual_seed(repeat))))
        for name in torch.randperm(len(steps), generator=Generator().manual_seed(repeat)).tolist():
            key = list(steps)[name]
            found = timed(steps[key], inside[key])
            report[key]["cpu"].append(found.cpu)
            report[key]["wall"].append(found.wall)
        del elsewhere
    return report


Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of inputs, weight and bias."""


def normalizations() -> dict[str, Operation]:
    return {
        "torch": lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True),
        "learnedopt": lambda x, weight, bias: batch_norm(x, weight, bias, 1e-5)[0],
    }


def convolutions(groups: int) -> dict[str, Operation]:
    geometry = Geometry(padding=(1, 1), groups=groups)
    return {
        "torch": lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1, groups=groups),
        "learnedopt": lambda x, weight, bias: convolution(x, weight, bias, geometry),
    }


def second_derivatives(repeats: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds to differentiate all first derivatives of an operation by all it has, with channels last."""
    draws = Generator().manual_seed(0)
    cases = [
        *(
            ("batch normalization", n, 1, size, normalizations())
            for n, size in ((5, 14), (20, 14), (100, 14), (100, 7))
        ),
        *(("convolution", n, groups, 14, convolutions(groups)) for n, groups in ((5, 1), (25, 1), (5, 8), (25, 8))),
    ]
    found: dict[str, dict[str, list[float]]] = {}
    for what, n, groups, size, ways in cases:
        channels = 64 * groups
        weight = torch.ones(64) if what == "batch normalization" else torch.randn(channels, 64, 3, 3, generator=draws)
        x, grad = (torch.randn(n, channels, size, size, generator=draws) for _ in range(2))
        x, grad = (value.to(memory_format=torch.channels_last).requires_grad_() for value in (x, grad))
        inputs = [x, weight.requires_grad_(), torch.zeros(channels).requires_grad_()]
        apart = f", in {groups} groups" if groups > 1 else ""
        times = found[f"{what}, {n} images, {channels} channels of {size}×{size}{apart}"] = {name: [] for name in ways}
        for _ in range(10 * repeats):
            for name, operation in ways.items():
                first = torch.autograd.grad(operation(*inputs), inputs, grad, create_graph=True)
                v = [torch.ones_like(value) for value in first]
                started = time.process_time()
                torch.autograd.grad(first, [*inputs, grad], v, allow_unused=True)
                times[name].append(time.process_time() - started)
    return found


def peak(problem: Problem, name: str) -> int | None:
    """In a process of its own, since a step would use again what the one before has freed."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found = pipe.read()
        os.waitpid(pid, 0)
        return int(found)
    try:
        os.write(writing, str(peak_bytes(rows(problem)[name]())).encode())
    finally:
        os._exit(0)


def peak_bytes(step: Step) -> int:
    """By how much the memory in use rises at most in a step, after one to warm up."""
    step()
    with contextlib.suppress(AttributeError):  # the C library's own; elsewhere freed memory stays in the base
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no more
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def report(result: dict[str, Any]) -> str:
    lines = [
        "# A step of meta-training",
        "",
        "Made by `benchmarks/fewshot_speed.py`, whose docstring says what the rows are. Milliseconds per step (loss",
        f"and gradient), medians of {result['repeats']} interleaved repeats; {result['machine']}, {result['threads']} "
        f"thread(s), torch {result['torch']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        "Where the machine has other work meanwhile, wall-clock times show it, and CPU times of the process hardly do.",
    ]
    for name, found in result["problems"].items():
        base = found["loop by hand"]["cpu"]
        ours = found["learnedopt"]["cpu"]
        lines += [
            "",
            f"## {name}",
            "",
            "| | CPU ms | wall ms | loop by hand / this | this / learnedopt | peak MB | same gradient |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for row, values in found.items():
            cpu, wall = (1e3 * statistics.median(values[kind]) for kind in ("cpu", "wall"))
            speed = statistics.median(loop / its for loop, its in zip(base, values["cpu"]))
            ratio = statistics.median(its / mine for its, mine in zip(values["cpu"], ours))
            memory = "" if values["peak bytes"] is None else f"{values['peak bytes'] / 1e6:.0f}"
            same = "yes" if values["same"] else f"no: off by {values['gradient off by']:.1g} of it"
            lines.append(f"| {row} | {cpu:.2f} | {wall:.2f} | {speed:.2f}× | {ratio:.2f}× | {memory} | {same} |")
    lines += [
        "",
        "## Second derivatives",
        "",
        "| | torch, CPU ms | learnedopt, CPU ms | torch / learnedopt |",
        "|---|--:|--:|--:|",
    ]
    for shape, times in result["second derivatives"].items():
        theirs, mine = (1e3 * statistics.median(times[name]) for name in ("torch", "learnedopt"))
        lines.append(f"| {shape} | {theirs:.2f} | {mine:.2f} | {theirs / mine:.1f}× |")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name, module in LIBRARIES.items():
        if importlib.util.find_spec(module) is not None:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # built in place
                found[name] = importlib.import_module(f"{module}._version").__version__
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three repeats, and nothing is written")
    arguments = parser.parse_args()
    # One of the libraries prints when it is imported, and several use what torch deprecates.
    warnings.simplefilter("ignore")
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        for module in LIBRARIES.values():
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
    repeats = 3 if arguments.quick else arguments.repeats
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "versions": versions(),
        "repeats": repeats,
        "problems": {},
        "second derivatives": second_derivatives(repeats),
    }
    for problem in problems():
        result["problems"][problem.name] = measure(problem, repeats)
        if not arguments.quick:
            for file, text in (("json", json.dumps(result, indent=1) + "\n"), ("md", report(result))):
                target = RESULTS / f"fewshot_speed.{file}"
                target.with_suffix(".new").write_text(text)
                os.replace(target.with_suffix(".new"), target)
    print(report(result))


if __name__ == "__main__":
    main()
