"""Meta-training by several processes, and by processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from learnedopt import zoo
from learnedopt.meta import MetaTrainConfig, MetaTrainer, Ranks
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Quadratics
from tests.meta.support import assert_same

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch is built without torch.distributed or its gloo backend", allow_module_level=True)
if not hasattr(os, "fork"):
    pytest.skip("this system cannot fork processes", allow_module_level=True)

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
KILLS = 5


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("killed")
        output = run([sys.executable, "-m", "tests.meta.killed", str(folder), str(processes), str(KILLS)], ROOT)
        found[processes] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_ends_as_one_left_alone(
    processes: int, outcomes: dict[int, dict[str, Any]]
) -> None:
    outcome = outcomes[processes]
    assert outcome["kills"] == KILLS
    assert len(set(outcome["lines at each kill"])) > 1
    assert outcome["finished"]
    assert outcome["same weights"]
    assert outcome["same everything"]
    assert outcome["same log"]


def test_how_many_processes_share_the_work_changes_no_bit(outcomes: dict[int, dict[str, Any]]) -> None:
    assert outcomes[1]["weights"] == outcomes[2]["weights"]


RECIPE = """
from learnedopt import zoo
from learnedopt.meta import MetaTrainConfig, Recipe
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Quadratics

RECIPE = Recipe(
    "tiny", "A rule for tests.", "quadratics", LSTMConfig(hidden_size=3),
    MetaTrainConfig(updates=6, unroll_length=2, horizon=(4, 4), copies=8, episodes=2, validate_every=3,
                    validation_episodes=2, validation_horizon=4),
    lambda root: Quadratics(dimension=3),
)
"""


def test_torchrun_trains_together_and_one_process_goes_on_from_there(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(RECIPE)
    command = ["-m", "learnedopt", "meta-train", "tiny.py", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first = run([*torchrun, *command, "run", "--time-limit", "0"], tmp_path)
    assert first.count("tiny: update 0 of 6, in run; reference backend by 2 processes") == 1
    assert first.count("stopped at update 1, all of it saved") == 1
    second = run([sys.executable, *command, "run", "--export", "zoo"], tmp_path)
    assert "tiny: update 1 of 6" in second
    run([sys.executable, *command, "alone", "--export", "zoo-alone"], tmp_path)
    together, alone = (zoo.load_rule(tmp_path / name / "tiny") for name in ("zoo", "zoo-alone"))
    assert_same(dict(together.state_dict()), dict(alone.state_dict()))


def test_what_is_gathered_alone_is_what_was_given() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert list(ranks.mine(3)) == [0, 1, 2]
    assert ranks.collect(["a", 1]) == ["a", 1]


@pytest.mark.parametrize("settings", [{"episodes": 3}, {"episodes": 2, "pool": 5}])
def test_processes_need_equal_shares(settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    config = MetaTrainConfig(updates=1, episodes=settings["episodes"], pool=settings.get("pool", 1))
    with pytest.raises(ValueError, match=r"2 processes share the episodes: (episodes|pool) must be a multiple"):
        MetaTrainer(LSTMConfig(hidden_size=2), Quadratics(), config)
