"""Honest comparison: tuned baselines, paired runs, statistics."""

from learnedopt.evaluation.baselines import BASELINES, Baseline
from learnedopt.evaluation.runs import DIVERGED, MakeOptimizer, Run, run, run_problems
from learnedopt.evaluation.tuning import GRID, Criterion, Tuned, tune

__all__ = [
    "BASELINES",
    "DIVERGED",
    "GRID",
    "Baseline",
    "Criterion",
    "MakeOptimizer",
    "Run",
    "Tuned",
    "run",
    "run_problems",
    "tune",
]
