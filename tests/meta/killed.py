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
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learnedopt.meta import AdamTeacher, Growing, Imitation, MetaTrainConfig, Recipe
from learnedopt.rules import LSTMConfig
from learnedopt.runs import Run
from learnedopt.tasks import Logistic, Mixture, Quadratics

FAMILY = Mixture((Quadratics(dimension=4), Logistic()))
RECIPE = Recipe(
    "killed",
    "A rule for tests.",
    "small problems",
    LSTMConfig(hidden_size=3),
    MetaTrainConfig(
        updates=300,
        unroll_length=3,
        horizon=(3, 12),
        curriculum=Growing(60),
        episodes=2,
        pool=4,
        copies=2,
        objective="log_ratio",
        imitation=Imitation(AdamTeacher(), share=0.3),
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


@dataclass(frozen=True)
class Doom:
    """When a process is to be killed: so many seconds after it has done so many updates."""

    updates: int
    seconds: float


def start(folder: Path, processes: int, life: int, doom: Doom | None = None) -> list[int]:
    """Fork the processes of a run, one of them doomed if any is; their process numbers, that one's first."""
    doomed = random.randrange(processes)
    pids = [_fork(folder, processes, rank, life, doom if rank == doomed else None) for rank in range(processes)]
    return [pids[doomed], *pids[:doomed], *pids[doomed + 1 :]]


def _fork(folder: Path, processes: int, rank: int, life: int, doom: Doom | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        if doom is not None and doom.updates == 0:
            _kill_in(doom.seconds)
        if processes > 1:
            meeting = folder.with_name(f"{folder.name}-{life}")
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
        for count, _ in enumerate(Run(RECIPE, folder).run(), start=1):
            if doom is not None and doom.updates == count:
                _kill_in(doom.seconds)
        status = 0
    finally:
        os._exit(status)


def _kill_in(seconds: float) -> None:
    """From another thread, so that it may happen in the middle of anything."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def finish(pids: list[int]) -> bool:
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return statuses == [0] * len(pids)


def bury(pids: list[int]) -> bool:
    """Wait for the doomed process, kill the others a moment later; whether it was killed before it was done."""
    killed = os.WIFSIGNALED(os.waitpid(pids[0], 0)[1])
    for pid in pids[1:]:
        time.sleep(0.002)
        if killed:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return killed


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
    folder.mkdir(parents=True, exist_ok=True)  # where processes meet before a run makes it
    random.seed(0)
    finished = [finish(start(folder / "whole", processes, 0))]
    reached, done = [], 0
    for life in range(kills):
        # One in four dies while it starts or reads its checkpoint.
        updates = random.choice([0, *random.choices(range(1, 9), k=3)])
        doom = Doom(updates, random.uniform(0.0, 0.02 if updates else 0.2))
        done += bury(start(folder / "killed", processes, life, doom))
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
