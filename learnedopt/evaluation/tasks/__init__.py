"""Tasks that are for judging only, and the three named sets of tasks."""

from learnedopt.evaluation.tasks.sets import TASK_SETS, BenchmarkTask, find_tasks

__all__ = ["TASK_SETS", "BenchmarkTask", "find_tasks"]
