"""The search over a few weights."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learnedopt.cli import main
from learnedopt.meta import Recipe, Search, SearchConfig
from learnedopt.meta.search import _gain, place
from learnedopt.rules import LSTMConfig, ScheduleFreeConfig, build_rule
from learnedopt.runs import Run
from learnedopt.tasks import Mixture, Quadratics, TaskFamily
from learnedopt.zoo import load_rule

RULE = ScheduleFreeConfig(nominal_step=1e-4)
FAMILY = Mixture((Quadratics(dimension=3), Quadratics(dimension=5)))
CONFIG = SearchConfig(
    updates=8,
    coordinates=(
        ("modulator.readout.bias[0]", 0.0, 0.5),
        ("modulator.readout.weight[0,9]", -0.1, 0.5),
        ("modulator.readout.bias[3]", 0.0, 0.5),
    ),
    population=6,
    horizon=24,
)


def test_it_finds_that_a_tiny_step_should_be_larger() -> None:
    search = Search(RULE, FAMILY, CONFIG)
    records = list(search.run())
    assert [record["update"] for record in records] == list(range(1, 9))
    assert records[-1]["meta_loss"] < -0.5 and search.finished
    start, found = build_rule(RULE), search.best_rule()
    assert float(found.get_parameter("modulator.readout.bias")[0]) > 0.3
    moved = {name for name, weight in found.named_parameters() if not torch.equal(weight, start.get_parameter(name))}
    assert moved == {"modulator.readout.bias", "modulator.readout.weight"}
    assert int((found.get_parameter("modulator.readout.weight") != 0).sum()) == 1


def test_the_start_has_no_gain_over_itself() -> None:
    (record,) = Search(RULE, FAMILY, replace(CONFIG, updates=1)).run()
    assert record["gains"] == [0.0, 0.0] and record["center"] != [0.0, 0.0, 0.0]


def test_a_gain_early_counts_less_than_one_at_the_end() -> None:
    """In steps of a curve that hardly falls: 0.3 after a third of it, and 0.7 at its end."""
    steps = np.arange(900)
    lower = math.exp(-0.02)  # by half of what counts as the least slope
    early, late = np.where(steps < 450, lower, 1.0), np.where(steps < 450, 1.0, lower)
    gains = _gain(np.stack([np.ones(900), early, late, np.full(900, lower)], axis=1))
    assert gains.tolist() == pytest.approx([0.0, 0.15, 0.35, 0.5], abs=1e-6)


def test_an_interrupted_search_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def make(root: Path | None) -> TaskFamily:
        return FAMILY

    recipe = Recipe("mine", "a search", "quadratics", RULE, replace(CONFIG, updates=4), make, checkpoint_every=1)
    whole = Run(recipe, tmp_path / "whole")
    expected = [record["center"] for record in whole.run()]
    found = []
    for _ in range(4):
        part = Run(recipe, tmp_path / "parts")
        found += [record["center"] for record in part.run(time_limit=0.0)]
    assert found == expected and part.trainer.finished
    assert whole.export(tmp_path / "zoo").meta_training["settings"]["kind"] == "search"
    rule = load_rule(tmp_path / "zoo" / "mine")
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), part.trainer.best_rule().parameters()))
    other = replace(recipe, training=replace(CONFIG, updates=4, population=8))
    with pytest.raises(ValueError, match="holds another run"):
        Run(other, tmp_path / "parts")


@pytest.mark.parametrize("copies", [1, 2])
def test_a_search_stops_within_a_generation_and_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    config = replace(CONFIG, updates=2, horizon=6, copies=copies)
    recipe = Recipe("mine", "a search", "quadratics", RULE, config, lambda root: FAMILY, checkpoint_every=1)
    whole = Run(recipe, tmp_path / "whole")
    expected = [{**record, "seconds": 0} for record in whole.run()]
    monkeypatch.setattr("learnedopt.meta.search._TURN", 0.0)  # asked after every step
    found, sittings = [], 0
    while not (part := Run(recipe, tmp_path / "parts")).trainer.finished:
        found += [{**record, "seconds": 0} for record in part.run(time_limit=0.0)]
        sittings += 1
        if sittings % 5 == 0:  # the same object may go on too
            found += [{**record, "seconds": 0} for record in part.run(time_limit=0.0)]
    assert sittings > 15
    assert found == expected
    texts = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    logs = [[{**json.loads(line), "seconds": 0} for line in text] for text in texts]
    assert logs[0] == logs[1] and len(logs[0]) == 6, "two tasks and a record for either generation"
    assert all({"task", "gain", "start", "end"} <= line.keys() for line in logs[0] if "part" in line)


def test_a_killed_search_loses_a_minute_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learnedopt.meta.search._TURN", 0.0)
    monkeypatch.setattr("learnedopt.runs.run._SAVE_AFTER", 0.0)
    recipe = Recipe("mine", "a search", "quadratics", RULE, replace(CONFIG, updates=1), lambda root: FAMILY)
    killed = Run(recipe, tmp_path)

    def kill(record: dict[str, object]) -> None:
        if "gain" in record:
            raise SystemError

    killed.trainer.listeners.append(kill)
    with pytest.raises(SystemError):
        list(killed.run())
    again = Run(recipe, tmp_path)
    (record,) = again.run()
    (expected,) = Search(RULE, FAMILY, replace(CONFIG, updates=1)).run()
    assert {**record, "seconds": 0} == {**expected, "seconds": 0}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["trainer"]["scores"] and not state["trainer"]["trials"]


def test_the_command_line_says_what_a_search_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("learnedopt.meta.search._TURN", 0.0)
    monkeypatch.setattr("learnedopt.runs.progress._EVERY", 0.0)
    recipe = tmp_path / "mine.py"
    recipe.write_text(SEARCH)
    again = ["meta-train", str(recipe), "--out", str(tmp_path / "run"), "--training.updates", "1"]
    assert main([*again, "--time-limit", "0"]) == 0
    output = capsys.readouterr().out
    assert "update 1, 8 %  Quadratics" in output
    assert "stopped at update 0, all of it saved" in output
    assert main(again) == 0
    assert re.search(
        r"update 1, 100 %  Quadratics: loss \S+, the start's \S+  \d+ s  \d+ min left", capsys.readouterr().out
    )


SEARCH = """
from learnedopt.meta import Recipe, SearchConfig
from learnedopt.rules import ScheduleFreeConfig
from learnedopt.tasks import Mixture, Quadratics

coordinates = (("modulator.readout.bias[0]", 0.0, 0.5), ("modulator.readout.bias[3]", 0.0, 0.5))
search = SearchConfig(updates=9, coordinates=coordinates, population=4, horizon=12)
rule = ScheduleFreeConfig()
RECIPE = Recipe("mine", "a search", "quadratics", rule, search, lambda root: Mixture((Quadratics(),)))
"""


def test_the_command_line_runs_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(SEARCH)
    command = ["meta-train", str(recipe), "--out", str(tmp_path / "run"), "--export", str(tmp_path / "zoo")]
    assert main([*command, "--training.updates", "2"]) == 0
    assert "at update 2" in capsys.readouterr().out
    assert load_rule(tmp_path / "zoo" / "mine").config == ScheduleFreeConfig()


def test_gains_are_logarithms_of_speed() -> None:
    steps = np.arange(1, 2001)[:, None]
    # Power laws, which are the same law at another speed; and one that diverges.
    curves = np.concatenate(
        [1.0 / steps, 1.0 / (2.0 * steps), 1.0 / (0.5 * steps), np.full(steps.shape, np.inf)], axis=1
    )
    gains = _gain(curves)
    assert gains[0] == 0.0
    assert gains[1:3] == pytest.approx([math.log(2.0), -math.log(2.0)], rel=0.1)
    assert gains[3] == -2.0
    # The same whatever the exponent: what falls slowly counts as much.
    assert _gain(curves**0.25)[:3] == pytest.approx(gains[:3], rel=0.1)
    assert np.isfinite(_gain(np.full((12, 2), np.nan))).all()


@pytest.mark.parametrize(
    ("coordinate", "problem"),
    [
        ("modulator.readout.bias[4]", "names no weight"),
        ("modulator.readout.bias", "names no weight"),
        ("modulator.readout.weight[3]", "names no weight"),
        ("read.bias[0]", r"There are modulator.readout.weight \(4, 14\)"),
        ("modulator.readout.bias[0]", "the same weight"),
    ],
)
def test_coordinates_that_are_not_there_are_named(coordinate: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Search(
            RULE, FAMILY, replace(CONFIG, coordinates=(("modulator.readout.bias[0]", 0.0, 1.0), (coordinate, 0.0, 1.0)))
        )


def test_places_count_through_all_weights() -> None:
    rule = build_rule(LSTMConfig(hidden_size=3))
    flat = torch.nn.utils.parameters_to_vector(rule.parameters())
    assert flat[place(rule, "readout.weight[0,2]")] == rule.get_parameter("readout.weight")[0, 2]
    assert flat[place(rule, "lstm.biases.1[5]")] == rule.get_parameter("lstm.biases.1")[5]


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"updates": 0}, "updates"),
        ({"population": 3}, "population"),
        ({"horizon": 5}, "horizon"),
        ({"std": 0.0}, "std"),
        ({"coordinates": (("modulator.readout.bias[0]", 0.0, 1.0),)}, "two coordinates"),
        (
            {"coordinates": (("modulator.readout.bias[0]", 0.0, 1.0), ("modulator.readout.bias[1]", 0.0, 0.0))},
            "positive",
        ),
        (
            {"coordinates": (("modulator.readout.bias[0]", 0.0, 1.0), ("modulator.readout.bias[1]", math.nan, 1.0))},
            "finite start",
        ),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(CONFIG, **setting)  # type: ignore[arg-type]


def test_a_family_must_be_a_mixture() -> None:
    with pytest.raises(TypeError, match="Mixture"):
        Search(RULE, Quadratics(), CONFIG)
