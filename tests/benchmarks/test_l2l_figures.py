"""The benchmark of the quadratic and MNIST figures, on something small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import l2l_figures
from benchmarks.l2l_figures import Setting
from learnedopt.data import digits
from learnedopt.meta import SGDTeacher
from learnedopt.rules import LSTMConfig, LSTMRule
from learnedopt.tasks import MLPClassification, Quadratics
from learnedopt.zoo import save_rule


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setting]:
    """Both kinds of setting, with an untrained LSTM."""
    folder = str(tmp_path_factory.mktemp("zoo") / "small")
    torch.manual_seed(0)
    rule = LSTMRule(LSTMConfig(hidden_size=2))
    save_rule(rule, folder, name="small", description="untrained", card="Untrained.", meta_training={})
    images, labels = digits().test
    quadratic = Setting("Quadratics", Quadratics(dimension=2), folder, (6,), 1, 6, 5, chunk=4)
    network = Setting(
        title="Digits",
        family=MLPClassification(hidden_sizes=((4,),), batch_sizes=(8,)),
        rule=folder,
        horizons=(4, 6),
        window=2,
        problems=3,
        selection_problems=2,
        chunk=2,
        test=(images.flatten(1), labels),
        teacher=SGDTeacher(lr=0.5, decay_steps=3.0),
    )
    return {"quadratic": quadratic, "digits": network}


@pytest.fixture(scope="module")
def finished(small: dict[str, Setting], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the results of a whole benchmark are."""
    out = tmp_path_factory.mktemp("results") / "new" / "figures"
    l2l_figures.benchmark(small, out, "the command")
    return out


def read(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return results


def test_it_runs_and_the_raw_results_give_the_same_table_again(finished: Path) -> None:
    out = finished
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    picture = out.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    for heading in ("Quadratics: step 6", "Digits: step 4", "Digits: step 6"):
        assert f"## {heading}\n" in table
    for name in ("SGD", "NAG", "RMSprop", "Adam", "LSTM"):
        assert table.count(f"| {name} |") == 3
    assert table.count("the best tuned baseline") == 6

    for suffix in (".md", ".png"):
        out.with_suffix(suffix).unlink()
    l2l_figures.main(["--table", "--out", str(out)])
    assert out.with_suffix(".md").read_text(encoding="utf-8") == table
    assert out.with_suffix(".png").read_bytes() == picture


def test_the_raw_results_hold_every_problem_the_whole_grid_and_where_they_come_from(finished: Path) -> None:
    parts = read(finished)["digits"]["optimizers"]
    assert parts.keys() == {"sgd", "nag", "rmsprop", "adam", "teacher", "lstm"}
    for name, part in parts.items():
        assert part["provenance"]["command"] == "the command"
        assert part["provenance"]["torch"] == torch.__version__
        for horizon in (4, 6):
            for statistic in ("mean", "median"):
                entry = l2l_figures.entry_of(part, horizon, statistic)
                assert len(entry["values"]) == 3
                if horizon == 6:
                    assert len(entry["test_values"]) == 3
                    assert len(entry["curves"]["median"]) == 7
                if name in l2l_figures.HAND_WRITTEN:
                    (tuned,) = (t for t in part["tuning"] if (t["horizon"], t["statistic"]) == (horizon, statistic))
                    assert len(tuned["scores"]) >= 14
                    scores = {lr: torch.inf if score is None else score for lr, score in tuned["scores"]}
                    assert scores[entry["lr"]] == min(scores.values())


def test_all_optimizers_start_from_the_same_problems(finished: Path) -> None:
    for setting in read(finished).values():
        starts = {
            entry["curves"]["mean"][0]
            for part in setting["optimizers"].values()
            for entry in part["entries"]
            if entry["curves"]
        }
        assert len(starts) == 1


def test_what_is_done_is_not_run_again_unless_it_would_come_out_otherwise(
    small: dict[str, Setting], tmp_path: Path
) -> None:
    out = tmp_path / "figures"
    quadratic = small["quadratic"]
    l2l_figures.benchmark({"quadratic": quadratic}, out, "first")

    def commands() -> dict[str, str]:
        parts = read(out)["quadratic"]["optimizers"]
        return {name: part["provenance"]["command"] for name, part in parts.items()}

    l2l_figures.benchmark({"quadratic": quadratic}, out, "second")
    assert set(commands().values()) == {"first"}

    folder = tmp_path / "other"
    save_rule(LSTMRule(LSTMConfig(hidden_size=3)), folder, name="x", description="x", card="x", meta_training={})
    l2l_figures.benchmark({"quadratic": replace(quadratic, rule=str(folder))}, out, "third")
    assert {name for name, command in commands().items() if command == "third"} == {"lstm"}

    l2l_figures.benchmark({"quadratic": replace(quadratic, rule=str(folder), problems=5)}, out, "fourth")
    assert set(commands().values()) == {"fourth"}


def test_diverged_runs_are_counted_in_the_table(finished: Path) -> None:
    results = {"quadratic": read(finished)["quadratic"]}
    for entry in results["quadratic"]["optimizers"]["lstm"]["entries"]:
        entry["values"][0] = None
    (row,) = (line for line in l2l_figures.table(results).splitlines() if line.startswith("| LSTM |"))
    mean, median, diverged = (cell.strip() for cell in row.split("|")[3:6])
    assert mean.startswith("inf")
    assert not median.startswith("inf")
    assert diverged == "1 / 1"


def test_an_unknown_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        l2l_figures.main(["--settings", "cifar"])
    assert "cifar" in capsys.readouterr().err


def test_mnist_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        l2l_figures.main(["--settings", "mnist"])
    assert "--root" in capsys.readouterr().err


def test_the_teacher_follows_its_schedule_and_is_no_baseline(finished: Path) -> None:
    teacher = SGDTeacher(lr=0.5, momentum=0.0, nesterov=False, decay_steps=3.0)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, steps = l2l_figures.scheduled(teacher, [weight]), []
    for _ in range(4):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        steps.append(before - weight.item())
    assert steps == pytest.approx([0.5, 0.375, 0.3, 0.25])

    table = finished.with_suffix(".md").read_text(encoding="utf-8")
    assert table.count("| the LSTM's teacher | untuned |") == 2
    assert table.count("its teacher; paired ratio") == 4
    assert "best tuned baseline, the LSTM's teacher" not in table
