"""The optimizer benchmark from end to end, on something small: resumable, paired, reproducible."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from learnedopt.cli import main
from learnedopt.evaluation import benchmark, records
from learnedopt.evaluation.benchmark import Benchmark, Plan, best_setting
from learnedopt.evaluation.contenders import HAND_WRITTEN
from learnedopt.evaluation.plots import COLORS, color_of
from learnedopt.evaluation.records import Record
from learnedopt.evaluation.report import write_report
from learnedopt.evaluation.tasks import TASK_SETS
from learnedopt.rules import LSTMConfig, LSTMRule
from learnedopt.zoo import ALIASES, list_entries, save_rule

TASKS = ("graph-wedges", "quadratic")
PLAN = Plan(horizon=10, multiples=(1, 2), reporting_seeds=3)


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("zoo") / "tiny")
    save_rule(
        LSTMRule(LSTMConfig(hidden_size=2)), folder, name="tiny", description="untrained", card="-", meta_training={}
    )
    return folder


@pytest.fixture(scope="module")
def finished(rule: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    list(Benchmark(path, TASKS, ("adam", "adamw-cosine", rule), PLAN, "the command").run())
    return path


def results(path: Path) -> list[Record]:
    """Everything but what depends on the clock."""
    return [record for record in records.read(path) if record["kind"] not in ("cost", "session")]


def by_key(found: list[Record]) -> dict[Any, Record]:
    return {(r["kind"], r["task"], r["contender"], r["steps"], str(r.get("setting"))): r for r in found}


def test_there_is_a_run_of_every_default_and_of_the_best_setting_for_each_horizon(finished: Path) -> None:
    found = results(finished)
    for task in TASKS:
        adam = [r for r in found if (r["task"], r["contender"]) == (task, "adam")]
        (sweep,) = records.of_kind(adam, "sweep")
        assert sweep["steps"] == 40 and len(sweep["settings"]) == 15
        ran = [r["setting"] for r in records.of_kind(adam, "run")]
        wanted = [{"lr": 0.001, "weight_decay": None}]
        wanted += [vars(best_setting(sweep, horizon)) for horizon in (10, 20)]
        assert len(ran) == len({str(one) for one in ran}) and {str(one) for one in ran} == {str(one) for one in wanted}
        assert {r["steps"] for r in records.of_kind(adam, "run")} == {20}, "one run serves both horizons"
        cosine = [r for r in found if (r["task"], r["contender"]) == (task, "adamw-cosine")]
        assert [r["steps"] for r in records.of_kind(cosine, "sweep")] == [10, 20], "a schedule knows its horizon"
        decays = {one["weight_decay"] for one in records.of_kind(cosine, "sweep")[0]["settings"]}
        assert decays == {0.0, 0.01, 0.1}


def test_selection_and_reporting_do_not_share_seeds(finished: Path) -> None:
    seeds = {(r["kind"], r["seeds"]["role"], r["seeds"]["copies"]) for r in results(finished)}
    assert seeds == {("sweep", "selection", 2), ("run", "reporting", 3)}
    assert benchmark._SELECTION != benchmark._REPORTING


def test_everybody_starts_from_the_same_losses(finished: Path) -> None:
    for task in TASKS:
        starts = [
            [row[0] for row in r["losses"]] for r in results(finished) if r["kind"] == "run" and r["task"] == task
        ]
        assert len(starts) > 3 and all(start == starts[0] for start in starts)


def test_a_finished_benchmark_runs_nothing_again(finished: Path, rule: str) -> None:
    before = finished.read_bytes()
    assert list(Benchmark(finished, TASKS, ("adam", rule), PLAN, "the command").run()) == []
    assert finished.read_bytes() == before


def test_stopped_anywhere_it_goes_on_to_the_same_results(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    job = Benchmark(path, ("graph-wedges",), ("adam",), PLAN, "the command")
    whole = {key: r for key, r in by_key(results(finished)).items() if key[1:3] in {("graph-wedges", "adam")}}
    steps = iter(job.run())
    for _ in range(3):
        next(steps)
    steps.close()
    path.write_bytes(path.read_bytes()[:-7])  # killed while it wrote
    list(job.run())
    again = by_key(results(path))
    assert {key: again[key] for key in whole} == whole


def test_processes_side_by_side_give_the_same_results(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    list(Benchmark(path, TASKS, ("adamw-cosine",), PLAN, "the command").run(processes=2))
    whole = {key: r for key, r in by_key(results(finished)).items() if key[2] == "adamw-cosine"}
    assert by_key(results(path)) == whole


def test_what_cannot_run_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    path = tmp_path / "results.jsonl"
    job = Benchmark(path, ("mnist", "graph-wedges"), ("schedule-free", "sgd"), Plan(horizon=10, tuning="none"), "")
    for _ in range(2):
        lines = list(job.run())
        assert any(line.startswith("skipped schedule-free: schedule-free needs the package") for line in lines)
        assert any(line.startswith("skipped mnist: task 'mnist' needs downloaded data") for line in lines)
    skips = records.of_kind(records.read(path), "skip")
    assert len(skips) == 2, "said once in the file, however often it is run"
    assert len(results(path)) == 3
    write_report([path], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "skipped schedule-free: " in page and "skipped mnist: " in page


@pytest.mark.parametrize(
    ("tasks", "contenders", "message"),
    [(("mnist-50",), ("adam",), "is no set of tasks"), (("siren",), ("adamm",), "is no optimizer")],
)
def test_what_does_not_exist_is_said_before_anything_runs(
    tmp_path: Path, tasks: tuple[str, ...], contenders: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(Benchmark(tmp_path / "results.jsonl", tasks, contenders, PLAN).run())
    assert not (tmp_path / "results.jsonl").exists()


def test_a_family_of_ones_own_is_run_and_reported_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report needs the file alone."""
    (tmp_path / "my_tasks.py").write_text("from learnedopt.tasks import Quadratics\nFAMILY = Quadratics(dimension=3)\n")
    with monkeypatch.context() as context:
        context.syspath_prepend(tmp_path)
        path = tmp_path / "results.jsonl"
        list(Benchmark(path, ("my_tasks:FAMILY", "quadratic"), ("adam",), PLAN).run())
    monkeypatch.delitem(sys.modules, "my_tasks")
    report = write_report([path], tmp_path / "report")
    assert "| my_tasks:FAMILY |" in (tmp_path / "report" / "report.md").read_text() and "2 of 2" in report
    write_report([path], tmp_path / "one", ["my_tasks:FAMILY"])
    assert "| quadratic |" not in (tmp_path / "one" / "report.md").read_text()


def test_a_family_that_draws_networks_of_several_shapes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be tuned on one and judged on another."""
    (tmp_path / "drawn_tasks.py").write_text("from learnedopt.tasks import Regression\nFAMILY = Regression()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="draws networks of several shapes"):
        list(Benchmark(tmp_path / "results.jsonl", ("drawn_tasks:FAMILY",), ("adam",), PLAN).run())
    monkeypatch.delitem(sys.modules, "drawn_tasks")


@pytest.mark.parametrize("change", [{"horizon": 20}, {"reporting_seeds": 4}])
def test_a_file_takes_no_runs_that_cannot_be_reported_on_together(finished: Path, change: dict[str, Any]) -> None:
    before = finished.read_bytes()
    with pytest.raises(ValueError, match="give these a file of their own"):
        list(Benchmark(finished, TASKS, ("adam",), dataclasses.replace(PLAN, **change)).run())
    assert finished.read_bytes() == before


def test_any_horizon_that_can_be_run_can_be_reported_on(tmp_path: Path) -> None:
    """Held-out losses are measured at every fifth measurement, and at the horizon too."""
    plan = Plan(horizon=12, multiples=(1, 2), selection_seeds=1, reporting_seeds=1, tuning="none")
    path = tmp_path / "results.jsonl"
    list(Benchmark(path, ("quadratic",), ("adam",), plan).run())
    summary = write_report([path], tmp_path / "report")
    assert "12 steps" in summary and "24 steps" in summary
    page = (tmp_path / "report" / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| adam | 1 of 1 |")]
    assert rows and all(line.endswith("|  |  |  |") for line in rows), "nobody has said what is to be reached"


@pytest.mark.parametrize(
    "settings", [{"horizon": 5}, {"horizon": 507}, {"reporting_seeds": 0}, {"multiples": ()}, {"multiples": (3,)}]
)
def test_plans_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="horizon"):
        Plan(**settings)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def reported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report([finished], folder)
    return folder


def test_the_report_is_a_function_of_the_file_bit_for_bit(finished: Path, reported: Path, tmp_path: Path) -> None:
    write_report([finished], tmp_path)
    first = digests(reported)
    assert first == digests(tmp_path)
    pictures = {f"{kind}-{steps}.png" for kind in ("curves", "profiles", "sensitivity", "cost") for steps in (10, 20)}
    assert first.keys() == {"index.html", "report.md"} | pictures


def test_the_report_shows_losses_command_versions_and_raw_file(finished: Path, reported: Path, rule: str) -> None:
    page = (reported / "index.html").read_text()
    # An untrained LSTM does next to nothing: behind tuned Adam everywhere.
    assert "against adam, tuned at 10 steps: ends above it on 2 of 2" in page
    assert "the command" in page and hashlib.sha256(finished.read_bytes()).hexdigest() in page
    assert page.count("data:image/png;base64,") == 8 and 'src="http' not in page
    assert "<script" not in page and "<b>" in page
    markdown = (reported / "report.md").read_text()
    assert "Where learned rules lose" in markdown and rule in markdown


def test_an_unfinished_file_can_be_reported_on(finished: Path, tmp_path: Path) -> None:
    some = [r for r in records.read(finished) if r["kind"] != "sweep" and r.get("task") != "quadratic"]
    path = tmp_path / "some.jsonl"
    for record in some:
        records.append(path, record)
    summary = write_report([path], tmp_path / "report")
    assert "adam, tuned" not in summary and "1 of 1" in summary


def test_the_command_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = str(tmp_path / "results.jsonl"), str(tmp_path / "page")
    run = ["benchmark", "run", "--tasks", "quadratic", "--optimizers", "adam", "sgd", "--out", file]
    assert main([*run, "--horizon", "10", "--untuned", "--reporting-seeds", "2"]) == 0
    assert "quadratic" in capsys.readouterr().out
    assert main(["benchmark", "report", file, "--out", folder]) == 0
    assert "### Summary at 10 steps" in capsys.readouterr().out
    assert Path(folder, "index.html").exists()
    (session,) = records.of_kind(records.read(Path(file)), "session")
    assert session["command"] == (
        "learnedopt benchmark run --tasks quadratic --optimizers adam sgd --horizon 10 --multiples 1 "
        "--selection-seeds 2 --reporting-seeds 2 --untuned"
    )


def test_the_command_lists_tasks_and_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(task.name in listed for tasks in TASK_SETS.values() for task in tasks)
    assert main(["benchmark", "report", str(tmp_path / "no.jsonl")]) == 2
    assert main(["benchmark", "run", "--tasks", "mnist-50", "--out", str(tmp_path / "r.jsonl")]) == 2


def test_a_task_without_its_data_fails_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in (["mnist"], ["mnist", "quadratic"]):
        run = ["benchmark", "run", "--tasks", *names, "--optimizers", "adam", "--untuned", "--horizon", "10"]
        assert main([*run, "--out", str(tmp_path / "results.jsonl")]) == 2
        captured = capsys.readouterr()
        assert "skipped mnist: task 'mnist' needs downloaded data" in captured.out
        assert captured.err == "error: not run, though asked for by name: mnist\n"
    assert ("quadratic" in captured.out) and "loss" in captured.out, "the others are run"


def test_a_picture_has_a_color_of_its_own_for_every_known_optimizer() -> None:
    known = {*HAND_WRITTEN, *list_entries()} - {"quadratic", "quadratic-uniform", "cifar10", "mnist-mlp-curriculum"}
    colors = {name: color_of(name) for name in known}
    assert len(set(colors.values())) == len(known)
    assert known <= COLORS.keys()
    assert color_of("default") == color_of(ALIASES["default"]) and color_of("light") == color_of(ALIASES["light"])
