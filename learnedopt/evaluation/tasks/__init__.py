"""Tasks that are for judging only, and the three named sets of tasks."""

from learnedopt.evaluation.tasks.sets import TASK_SETS, BenchmarkTask, find_tasks, task_names

__all__ = ["TASK_SETS", "BenchmarkTask", "find_tasks", "task_names"]
