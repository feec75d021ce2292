"""Honest comparison: tuned baselines, paired runs, statistics."""

from learnedopt.evaluation.benchmark import Benchmark, Plan
from learnedopt.evaluation.contenders import Contender, Setting, find_contender
from learnedopt.evaluation.measurement import DIVERGED
from learnedopt.evaluation.report import write_report
from learnedopt.evaluation.scores import Results
from learnedopt.evaluation.statistics import Estimate, Summary, bootstrap, paired_ratio, share_below, summarize
from learnedopt.evaluation.tasks import TASK_SETS, BenchmarkTask

__all__ = [
    "DIVERGED",
    "TASK_SETS",
    "Benchmark",
    "BenchmarkTask",
    "Contender",
    "Estimate",
    "Plan",
    "Results",
    "Setting",
    "Summary",
    "bootstrap",
    "find_contender",
    "paired_ratio",
    "share_below",
    "summarize",
    "write_report",
]
