"""Honest comparison: tuned baselines, paired runs, statistics."""

from learnedopt.evaluation.baselines import BASELINES, Baseline
from learnedopt.evaluation.runs import DIVERGED, MakeOptimizer, Run, run, run_problems
from learnedopt.evaluation.statistics import Estimate, Summary, bootstrap, paired_ratio, share_below, summarize
from learnedopt.evaluation.tuning import GRID, Criterion, Tuned, tune

__all__ = [
    "BASELINES",
    "DIVERGED",
    "GRID",
    "Baseline",
    "Criterion",
    "Estimate",
    "MakeOptimizer",
    "Run",
    "Summary",
    "Tuned",
    "bootstrap",
    "paired_ratio",
    "run",
    "run_problems",
    "share_below",
    "summarize",
    "tune",
]
