"""What the optimizers do over two processes; ``scenarios.py`` says what is done and checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch is built without torch.distributed or its gloo backend", allow_module_level=True)

from tests.distributed.scenarios import SCENARIOS, WORLD

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds until processes that hang are ended; they need twenty on an idle machine."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "tests.distributed.scenarios"]
    logs = [(folder / f"{rank}.log").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        pass  # what is missing from the reports says where it hung
    finally:
        for process, log in zip(processes, logs):
            process.kill()
            process.wait()
            log.close()
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    for rank, file in enumerate(files):
        assert file.exists(), f"process {rank} did not get to the end of a scenario: {logs[rank].name}"
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", SCENARIOS)
def test_over_two_processes(reports: list[dict[str, str]], name: str) -> None:
    for rank, report in enumerate(reports):
        outcome = report.get(name, "it did not come to an end")
        assert outcome == "passed", f"process {rank}: {outcome}"
