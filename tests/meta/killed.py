"""A run that is killed again and again, and one that is left alone.

``python -m tests.meta.killed FOLDER PROCESSES KILLS`` prints what came of them as JSON. A program of its own, because
it forks, which is safe only before threads start.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learnedopt.meta import AdamTeacher, Imitation, MetaTrainConfig, MetaTrainingRun, Recipe
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Logistic, Mixture, Quadratics

FAMILY = Mixture((Quadratics(dimension=4), Logistic()))
RECIPE = Recipe(
    "killed",
    "A rule for tests.",
    "small problems",
    LSTMConfig(hidden_size=3),
    MetaTrainConfig(
        updates=200,
        unroll_length=3,
        horizon=(3, 12),
        curriculum_updates=60,
        episodes=2,
        pool=4,
        copies=2,
        objective="log_ratio",
        imitation=Imitation(AdamTeacher()),
        imitation_share=0.3,
        clip_norm=1.0,
        ema_decay=0.9,
        learning_rate=1e-2,
        validate_every=20,
        validation_copies=2,
        validation_episodes=3,
        validation_horizon=5,
    ),
    lambda root: FAMILY,
    checkpoint_every=4,
)


def start(folder: Path, processes: int, life: int) -> list[int]:
    """Fork the processes of a run; their process numbers."""
    return [pid for rank in range(processes) if (pid := _fork(folder, processes, rank, life))]


def _fork(folder: Path, processes: int, rank: int, life: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        if processes > 1:
            meeting = folder.with_name(f"{folder.name}-{life}")
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
        for _ in MetaTrainingRun(RECIPE, folder).run():
            pass
        status = 0
    finally:
        os._exit(status)


def finish(pids: list[int]) -> bool:
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return statuses == [0] * len(pids)


def kill(pids: list[int]) -> bool:
    """Kill the processes, one a moment before the others; whether any was still running."""
    running = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    random.shuffle(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.002)
    return bool(running)


def wait_for_checkpoints(folder: Path, count: int, limit: float = 60.0) -> None:
    """Until so many more have been written than there are now."""
    file, seen, until = folder / "checkpoint.pt", 0, time.perf_counter() + limit
    last = file.stat().st_mtime_ns if file.exists() else None
    while seen < count and time.perf_counter() < until:
        time.sleep(0.001)
        now = file.stat().st_mtime_ns if file.exists() else None
        seen, last = seen + (now != last), now


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def main(folder: Path, processes: int, kills: int) -> dict[str, Any]:
    random.seed(0)
    started = time.perf_counter()
    pids = start(folder / "whole", processes, 0)
    wait_for_checkpoints(folder / "whole", 1)
    first = time.perf_counter() - started
    finished = [finish(pids)]
    interval = (time.perf_counter() - started - first) / (RECIPE.training.updates / RECIPE.checkpoint_every)
    reached, done = [], 0
    for life in range(2 * kills):
        if done == kills:
            break
        pids = start(folder / "killed", processes, life)
        checkpoints = random.choice([0, 1, 1, 2])
        if checkpoints:
            wait_for_checkpoints(folder / "killed", checkpoints)
        time.sleep(random.uniform(0.0, 2.0 * interval if checkpoints else first))
        done += kill(pids)
        log = folder / "killed" / "log.jsonl"
        reached.append(log.read_bytes().count(b"\n") if log.exists() else 0)
    finished.append(finish(start(folder / "killed", processes, -1)))
    whole, killed = (
        torch.load(folder / name / "checkpoint.pt", weights_only=True)["trainer"] for name in ("whole", "killed")
    )
    return {
        "processes": processes,
        "kills": done,
        "updates": whole["update"],
        "lines at each kill": reached,
        "finished": all(finished),
        "weights": hashlib.sha256(b"".join(value.numpy().tobytes() for value in whole["rule"].values())).hexdigest(),
        "same weights": same(whole["rule"], killed["rule"]) and same(whole["best_weights"], killed["best_weights"]),
        "same everything": same(whole, killed),
        "same log": same(lines(folder / "whole"), lines(folder / "killed")),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
