"""How many copies of a task fit into memory."""

from __future__ import annotations

import os

import torch
from torch import Generator, Tensor

from learnedopt.meta.config import MetaTrainConfig
from learnedopt.meta.unroll import Episode
from learnedopt.rules import UpdateRule
from learnedopt.tasks.base import TaskFamily

SHARE = 0.5
"""Part of the free memory that a window may fill; the rest is for what it computes on the way."""
MOST = 256
_DRAWS = 8


def copies_that_fit(rule: UpdateRule, family: TaskFamily, config: MetaTrainConfig, free: int | None = None) -> int:
    """The largest number of copies, from 2 to 256, for which a window is sure to fit into half of the free memory.

    What a window keeps for its backward pass is counted, not guessed: it is run on two copies of the largest of a few
    drawn structures. The running episodes of the pool are added.

    Args:
        rule: On the device to train on.
        family: Tasks to be trained on.
        config: How to train; its ``copies`` are not read.
        free: Bytes to go by; by default what the device has free.

    Raises:
        MemoryError: not even two copies fit.
        ValueError: the system does not tell how much memory is free.
    """
    device = next(rule.parameters()).device
    free = free_memory(device) if free is None else free
    generator = Generator().manual_seed(config.seed)
    tasks = [family.draw(generator, 2) for _ in range(_DRAWS)]
    task = max(tasks, key=lambda task: sum(value.numel() for value in task.init(generator).values()))
    episode = config.estimator.start(rule, task, generator)
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        steps = config.estimator.steps(config.unroll_length, config.longest_horizon)
        _, after = config.estimator.estimate(rule, episode, steps, generator, config.meta_objective)
    running = max(config.pool, config.episodes) + 2  # and the one that is being computed, before and after
    per_copy = (sum(storages.values()) + running * _episode_bytes(after)) / 2
    copies = min(MOST, int(SHARE * free / per_copy))
    if copies < 2:
        raise MemoryError(
            f"a window of {steps} steps on {task!r} needs {per_copy / 2**20:.0f} MiB per copy, and "
            f"{free / 2**20:.0f} MiB are free: shorten unroll_length, or set recompute in the estimator"
        )
    return copies


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now.

    Raises:
        ValueError: the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError("this system does not say how much memory is free: set the number of copies") from error


def _episode_bytes(episode: Episode) -> int:
    tensors = [episode.theta, episode.grad, episode.loss, *episode.state.values(), *episode.memory.values()]
    return sum(tensor.nbytes for tensor in tensors)
