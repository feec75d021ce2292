"""Honest comparison: tuned baselines, paired runs, statistics."""

from learnedopt.evaluation.baselines import BASELINES, Baseline
from learnedopt.evaluation.benchmark import Benchmark, Plan
from learnedopt.evaluation.contenders import Contender, Setting, find_contender
from learnedopt.evaluation.report import write_report
from learnedopt.evaluation.runs import DIVERGED, MakeOptimizer, Run, run, run_problems
from learnedopt.evaluation.scores import Results
from learnedopt.evaluation.statistics import Estimate, Summary, bootstrap, paired_ratio, share_below, summarize
from learnedopt.evaluation.tasks import TASK_SETS, BenchmarkTask
from learnedopt.evaluation.tuning import GRID, Criterion, Tuned, tune

__all__ = [
    "BASELINES",
    "DIVERGED",
    "GRID",
    "TASK_SETS",
    "Baseline",
    "Benchmark",
    "BenchmarkTask",
    "Contender",
    "Criterion",
    "Estimate",
    "MakeOptimizer",
    "Plan",
    "Results",
    "Run",
    "Setting",
    "Summary",
    "Tuned",
    "bootstrap",
    "find_contender",
    "paired_ratio",
    "run",
    "run_problems",
    "share_below",
    "summarize",
    "tune",
    "write_report",
]
