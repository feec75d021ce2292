"""The optimizer benchmark: hand-written and learned optimizers, tuned and untuned, on sets of tasks.

    python benchmarks/optimizers.py run --tasks heldout --out benchmarks/results/optimizers.jsonl
    python benchmarks/optimizers.py report benchmarks/results/optimizers.jsonl --out benchmarks/results/optimizers

It is the command ``learnedopt benchmark`` under another name; docs/benchmark.md says what is measured and how.
"""

from __future__ import annotations

import sys

from learnedopt.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
