"""Result files of an earlier version load, and say what they said: scores and report were made at commit 3e08385."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from learnedopt.evaluation import write_report
from learnedopt.evaluation.records import read
from learnedopt.evaluation.scores import Entry, Results, profile_score

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDS = FIXTURES / "optimizers.jsonl"
"""Two tasks and four optimizers, lines of ``benchmarks/results/optimizers-heldout.jsonl``."""


def scores(results: Results) -> dict[str, list[float]]:
    """Everything that a report is made from, at every horizon."""
    found: dict[str, list[float]] = {}
    for horizon in results.horizons:
        for of, held_out in (("steps", False), ("seconds", False), ("steps", True)):
            profile = results.profile(results.entries, horizon, of, held_out)
            found[f"{horizon}: profile, {of}, held-out {held_out}"] = profile_score(profile).tolist()
        for entry in results.entries:
            about = f"{horizon}, {entry}"
            found[f"{about}: diverged"] = [results.diverged(entry, horizon)]
            speedup = results.mean_speedup(entry, horizon)
            assert speedup is not None
            found[f"{about}: mean speed-up"] = [speedup.value, speedup.low, speedup.high]
            for other in (Entry("adam", False), Entry("adam", True)):
                comparison = results.compare(entry, other, horizon)
                assert comparison is not None
                found[f"{about}: against {other}"] = list(vars(comparison).values())
            for task in results.tasks:
                setting = results.setting(task, entry, horizon)
                assert setting is not None
                found[f"{about}, {task}: setting"] = [setting.lr, setting.weight_decay or 0.0]
                found[f"{about}, {task}: cost"] = list(results.cost(task, entry.contender) or ())
                for measure in (
                    results.final,
                    results.best,
                    results.held_out,
                    results.accuracy,
                    results.speedup,
                    results.steps_to_target,
                    results.seconds_to_target,
                ):
                    values = measure(task, entry, horizon)
                    found[f"{about}, {task}: {measure.__name__}"] = [] if values is None else values.tolist()
    return found


def test_scores_are_what_they_were() -> None:
    expected = json.loads((FIXTURES / "optimizers.json").read_text())
    found = scores(Results(read(RECORDS)))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=1e-9), name
    assert any(np.isinf(values).any() for values in found.values()), "runs that diverged are among them"


def test_the_report_is_what_it_was(tmp_path: Path) -> None:
    write_report([RECORDS], tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    expected = (FIXTURES / "optimizers.md").read_text(encoding="utf-8")
    assert re.sub("matplotlib .*", "matplotlib", report) == expected
