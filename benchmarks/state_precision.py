"""What keeping the state in fewer bits does to the final loss, on the tasks the rules of the zoo were made for.

    python benchmarks/state_precision.py --root DATA
    python benchmarks/state_precision.py --only default    # after its weights have changed; other results are kept

DATA holds MNIST where torchvision keeps it, in MNIST/raw; without ``--root`` that setting is left out. Every problem is
run with state in float32, bfloat16 and int8: same start, same batches, so that the comparison is paired. A row with
float32 state and another backend, which only rounds differently, shows how far trajectories part by themselves. A rule
that has no state to keep in fewer bits is left out.

What is compared is the loss at the last step, averaged over the last ten where it is that of a minibatch. Given are the
ratio of mean losses and the ratio of medians, float32 being 1, with 95 % bootstrap intervals over problems, and the
geometric mean of the problems' own ratios. Results are saved after each setting.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import learnedopt
from learnedopt.data import mnist
from learnedopt.evaluation import bootstrap, paired_ratio
from learnedopt.evaluation.statistics import Values, mean, median
from learnedopt.kernels import BackendName, state_layout
from learnedopt.optim import LearnedOptimizer
from learnedopt.runs import source_commit
from learnedopt.tasks import (
    Autoencoder,
    CharAttention,
    CharRNN,
    Conv,
    Logistic,
    MatrixFactorization,
    MLPClassification,
    Quadratics,
    Regression,
    TaskFamily,
)
from learnedopt.zoo import entry_info, load_rule

# Run as a file, a program finds the modules of its own folder only.
sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.harness.runs import run_problems

SEED = 3
VARIANTS: dict[str, tuple[torch.dtype, BackendName]] = {
    "float32": (torch.float32, "auto"),
    "float32, another backend": (torch.float32, "reference"),
    "bfloat16": (torch.bfloat16, "auto"),
    "int8": (torch.int8, "auto"),
}


ON_MNIST = ("mnist-mlp", "mnist-mlp-curriculum", "rnnprop")
"""Rules that were made for one network on MNIST."""


@dataclass(frozen=True)
class Setting:
    rule: str
    """A name in the zoo."""
    family: TaskFamily
    steps: int
    problems: int
    chunk: int
    window: int = 10
    """How many of the last steps are averaged."""
    stacked: bool = False
    """Run all problems in one optimizer: exact for rules without statistics of whole tensors, and faster."""


def settings(root: Path | None, share: float) -> dict[str, Callable[[], Setting]]:
    def count(problems: int) -> int:
        return max(2, round(share * problems))

    def quadratic(rule: str, entries: Any) -> Setting:
        return Setting(rule, Quadratics(entries=entries), 100, count(4000), chunk=500, window=1, stacked=True)

    def network(rule: str) -> Setting:
        assert root is not None
        family = MLPClassification(mnist(root), ((20,),), ("sigmoid",), initial_std=None)
        return Setting(rule, family, steps=200, problems=count(32), chunk=16, stacked=True)

    families: dict[str, Callable[[], TaskFamily]] = {
        "digits MLP": lambda: MLPClassification(initial_std=None),
        "regression": Regression,
        "autoencoder": Autoencoder,
        "logistic": Logistic,
        "character RNN": CharRNN,
        "character attention": CharAttention,
        "matrix factorization": MatrixFactorization,
        "convolutions": Conv,
    }

    def general(rule: str, make_family: Callable[[], TaskFamily]) -> Setting:
        return Setting(rule, make_family(), steps=500, problems=count(32), chunk=8)

    return {
        "quadratic": lambda: quadratic("quadratic", "gaussian"),
        "quadratic-uniform": lambda: quadratic("quadratic-uniform", "uniform"),
        **{rule: partial(network, rule) for rule in ON_MNIST},
        **{
            f"{rule}, {name}": partial(general, rule, make_family)
            for rule in filter(keeps_vectors, ("adam-lstm", "default"))
            for name, make_family in families.items()
        },
    }


def keeps_vectors(rule: str) -> bool:
    """Whether a rule has state that is kept in fewer bits."""
    layout = state_layout(load_rule(rule), torch.float32, "int8")
    return any(spec.dtype == torch.int8 for spec in layout.values())


def final_losses(setting: Setting, state_dtype: torch.dtype, backend: BackendName) -> list[float]:
    def make(params: Iterable[Tensor]) -> LearnedOptimizer:
        return LearnedOptimizer(params, setting.rule, state_dtype=state_dtype, backend=backend)

    # Chunk by chunk, because a family may give each another structure.
    runs = [
        run_problems(
            setting.family, make, setting.chunk, setting.steps, seed, chunk=setting.chunk, stacked=setting.stacked
        )
        for seed in range(SEED, SEED + max(1, setting.problems // setting.chunk))
    ]
    losses = torch.cat([one.losses for one in runs], dim=1)
    return [float(loss) for loss in losses[-setting.window :].mean(0)]


def compare(losses: dict[str, list[float]]) -> dict[str, Any]:
    def geometric(ours: Values, theirs: Values) -> Values:
        return np.asarray(np.exp(np.log(ours / theirs).mean(-1)))

    base = losses["float32"]
    return {
        name: {
            "mean": asdict(paired_ratio(mean, values, base)),
            "median": asdict(paired_ratio(median, values, base)),
            "geometric mean": asdict(bootstrap(geometric, values, base)),
        }
        for name, values in losses.items()
        if name != "float32"
    }


def table(results: dict[str, Any]) -> str:
    def cell(estimate: dict[str, float]) -> str:
        value, low, high = (100.0 * (estimate[key] - 1.0) for key in ("value", "low", "high"))
        return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"

    lines = [
        "| task | state | mean final loss | median | geometric mean of ratios |",
        "|---|---|---|---|---|",
    ]
    for task, result in results.items():
        for name, ratios in result["ratios"].items():
            cells = " | ".join(cell(ratios[key]) for key in ("mean", "median", "geometric mean"))
            lines.append(f"| {task} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the folder that holds MNIST")
    parser.add_argument("--share", type=float, default=1.0, help="the share of the problems to run")
    parser.add_argument("--only", nargs="*", default=[], help="the tasks to run, by the beginnings of their names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/state_precision.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = settings(args.root, args.share)
    results: dict[str, Any] = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    for name, make in makers.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        if name in ON_MNIST and args.root is None:
            continue
        setting = make()
        losses = {variant: final_losses(setting, *how) for variant, how in VARIANTS.items()}
        results[name] = {
            "rule": setting.rule,
            "sha256": entry_info(setting.rule).sha256,
            "backend": LearnedOptimizer([torch.zeros(1)], setting.rule).backend,
            "steps": setting.steps,
            "problems": len(losses["float32"]),
            "commit": source_commit(),
            "torch": str(torch.__version__),
            "ratios": compare(losses),
            "losses": losses,
        }
        print(table({name: results[name]}), flush=True)
        provenance = {
            "learnedopt": learnedopt.__version__,
            "machine": f"1 CPU thread, {platform.machine()}",
            "seed": SEED,
        }
        ordered = {name: results[name] for name in makers if name in results}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**provenance, "results": ordered}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(ordered))


if __name__ == "__main__":
    main()
