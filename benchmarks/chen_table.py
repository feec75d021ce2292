"""The table of Chen et al. 2020: the loss after ten thousand steps on five problems, for rules of this package.

    learnedopt benchmark run --tasks chen-mlp chen-relu chen-two-layers --untuned --horizon 10000 --reporting-seeds 2 \\
        --optimizers default light rnnprop mnist-mlp adam-lstm adam mnist-mlp-curriculum --root DIR --out chen.jsonl
    learnedopt benchmark run --tasks chen-conv-mnist chen-conv-cifar10 --untuned --horizon 10000 --reporting-seeds 1 \\
        --optimizers light rnnprop --root DIR --out chen-conv.jsonl
    python benchmarks/chen_table.py benchmarks/results/chen*.jsonl

writes ``benchmarks/results/chen.md``. Their figures are read off the curves of *Training Stronger Baselines for
Learning to Optimize* (arXiv:2010.09089), as natural logarithms. Ours are those of the training loss at the last
step, on fixed training batches and averaged over the last steps as everywhere in the benchmark; of these, the mean over
seeds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from learnedopt.evaluation.records import decode, of_kind, read
from learnedopt.evaluation.tasks import TASK_SETS

PROBLEMS = {
    "chen-mlp": "MLP",
    "chen-relu": "MLP, ReLU",
    "chen-two-layers": "two layers",
    "chen-conv-mnist": "conv, MNIST",
    "chen-conv-cifar10": "conv, CIFAR-10",
}
PUBLISHED = {
    "LSTM of Andrychowicz et al.": (0.0, 1.3, 0.0, 1.7, 0.83),
    "the same, 500 steps": (-3.0, -0.9, -0.8, -0.9, 0.83),
    "the same, imitation": (-3.2, -1.0, -2.9, -2.0, 0.70),
    "the same, curriculum": (-6.0, -4.0, -4.0, 0.3, 0.77),
    "the same, curriculum and imitation": (-10.9, -7.0, -7.0, -4.9, 0.33),
    "RNNprop": (-6.0, -4.0, -4.0, 0.35, 0.83),
    "scale hierarchies": (-1.0, -3.1, -1.0, -0.4, 0.77),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of `learnedopt benchmark run`")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/chen.md"))
    args = parser.parse_args()
    assert list(PROBLEMS) == [task.name for task in TASK_SETS["chen"]]
    ours: dict[str, dict[str, str]] = {}
    for record in of_kind([record for path in args.results for record in read(path)], "run"):
        if record["task"] in PROBLEMS and record["steps"] == 10_000:
            finals = np.log(decode(record["losses"])[:, -1])
            diverged = sum(map(math.isinf, finals))
            value = f"{finals.mean():.2f}" if not diverged else f"diverged in {diverged} of {len(finals)}"
            name = record["contender"] + ("" if record["learned"] else f", lr {record['setting']['lr']:g}")
            ours.setdefault(name, {})[record["task"]] = value + ("" if len(finals) > 1 else " (one seed)")
    lines = [
        "| | " + " | ".join(PROBLEMS.values()) + " |",
        "|---|" + "--:|" * len(PROBLEMS),
        *(f"| {name}, published | " + " | ".join(f"{x:g}" for x in row) + " |" for name, row in PUBLISHED.items()),
        *(f"| `{name}` | " + " | ".join(row.get(task, "") for task in PROBLEMS) + " |" for name, row in ours.items()),
    ]
    table = "\n".join(lines) + "\n"
    args.out.write_text(
        "# Chen et al.'s problems\n\nNatural logarithm of the training loss after 10,000 steps; the lower the better. "
        "Networks, initialisation and what is averaged differ from theirs in details (docs/benchmark.md).\n\n"
        f"{table}\nMade by `python benchmarks/chen_table.py {' '.join(map(str, args.results))}`.\n"
    )
    print(table)


if __name__ == "__main__":
    main()
