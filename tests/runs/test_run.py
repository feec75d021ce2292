"""Runs can be stopped, continued and trusted: here those of meta-training."""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator

from learnedopt import runs, zoo
from learnedopt.meta import MetaTrainConfig, MetaTrainer, Recipe
from learnedopt.rules import AdamLSTMConfig, LSTMConfig, RuleConfig
from learnedopt.runs import Run, Stop, Trainable, load_file
from learnedopt.runs.folder import RunFolder
from learnedopt.tasks import Quadratics, TaskFamily
from tests.fewshot.test_training import SINE
from tests.meta.support import assert_same
from tests.meta.test_trainer import FAMILY, MIXED, RULE, SHORT, horizons


def recipe(
    name: str = "tiny", rule: RuleConfig = RULE, training: MetaTrainConfig = SHORT, tasks: TaskFamily | None = None
) -> Recipe:
    family = tasks or Quadratics(dimension=3)
    return Recipe(name, "A rule for tests.", "small problems", rule, training, lambda root: family, checkpoint_every=4)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def outcome(run: Run[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.trainer.state_dict().items() if key != "seconds"}


def stop_by_time(run: Run[Any, Any]) -> None:
    list(run.run(time_limit=0.0))


def stop_by_leaving(run: Run[Any, Any]) -> None:
    with closing(run.run()) as records:
        for _ in zip(range(2), records):
            pass


def stop_by_failing(run: Run[Any, Any]) -> None:
    """As an interrupt in the middle of an update would: some of it is done and some is not."""
    trainer = run.trainer
    assert isinstance(trainer, MetaTrainer)
    draw, calls = trainer.pool.draw, iter(range(4))

    def interrupted(generator: Generator) -> Any:
        task = draw(generator)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return task

    trainer.pool.draw = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(run.run())


def stop_by_killing(run: Run[Any, Any]) -> None:
    """Nothing is cleaned up: the last periodic checkpoint remains, and a line of the log that was being written."""
    records = run.run()
    for _ in range(5):
        next(records)
    checkpoint, text = (run.folder / "checkpoint.pt").read_bytes(), (run.folder / "log.jsonl").read_text()
    records.close()
    (run.folder / "checkpoint.pt").write_bytes(checkpoint)
    (run.folder / "log.jsonl").write_text(text + '{"update": 5, "meta_l')


@pytest.fixture(scope="module", params=[RULE, AdamLSTMConfig(hidden_size=2)], ids=lambda rule: rule.kind)
def mixed(request: pytest.FixtureRequest) -> Recipe:
    return recipe(rule=request.param, training=MIXED, tasks=FAMILY)


@pytest.fixture(scope="module")
def uninterrupted(mixed: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run[Any, Any]:
    run = Run(mixed, tmp_path_factory.mktemp("run"))
    list(run.run())
    return run


@pytest.mark.parametrize("stop", [stop_by_time, stop_by_leaving, stop_by_failing, stop_by_killing])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    stop: Callable[[Run[Any, Any]], None], mixed: Recipe, uninterrupted: Run[Any, Any], tmp_path: Path
) -> None:
    stop(Run(mixed, tmp_path))
    stop_by_time(Run(mixed, tmp_path))
    run = Run(mixed, tmp_path)
    assert not run.trainer.finished
    list(run.run())
    assert run.trainer.update == MIXED.updates
    assert_same(outcome(run), outcome(uninterrupted))
    assert log(tmp_path) == log(uninterrupted.folder)
    assert [line["update"] for line in log(tmp_path)] == list(range(1, MIXED.updates + 1))


def test_the_runs_above_have_episodes_of_several_kinds_and_lengths(uninterrupted: Run[Any, Any]) -> None:
    slots = uninterrupted.trainer.state_dict()["slots"]
    assert len(slots) == MIXED.pool
    trainer = MetaTrainer(RULE, FAMILY, MIXED)
    trainer.update = MIXED.updates
    generator = Generator().manual_seed(0)
    assert len({repr(trainer.pool.draw(generator)).split("(")[0] for _ in range(20)}) == 3
    assert horizons(trainer) == {3, 6, 9, 12}


def test_a_finished_run_is_left_as_it_is(uninterrupted: Run[Any, Any], mixed: Recipe) -> None:
    again = Run(mixed, uninterrupted.folder)
    assert again.trainer.finished
    assert list(again.run()) == []
    assert_same(outcome(Run(mixed, uninterrupted.folder)), outcome(uninterrupted))
    assert len(log(uninterrupted.folder)) == MIXED.updates


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (recipe(rule=LSTMConfig(hidden_size=4)), "hidden_size': 3.*hidden_size': 4"),
        (recipe(training=replace(SHORT, copies=2, seed=1)), r"other settings: \['copies', 'seed'\]"),
        (recipe(name="other"), "a run of the recipe 'tiny', not 'other'"),
        (recipe(tasks=Quadratics(dimension=5)), "tasks have changed"),
    ],
    ids=["rule", "settings", "recipe", "tasks"],
)
def test_a_folder_with_another_run_is_refused_and_not_touched(other: Recipe, message: str, tmp_path: Path) -> None:
    stop_by_time(Run(recipe(), tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as raised:
        Run(other, tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[1]"), ("config.json", '{"recipe": "other"}'), ("config.json", "no JSON"), ("log.jsonl", "mine")],
)
def test_files_that_are_not_a_runs_stay_as_they_are(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"has a {name} that is not of a run of tiny: choose another folder"):
        Run(recipe(), tmp_path)
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "foreign"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    stop_by_time(Run(recipe(), tmp_path))
    file = tmp_path / "checkpoint.pt"
    data = file.read_bytes()
    if damage == "foreign":
        torch.save({"model": torch.ones(2)}, file)
    else:
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "noise": b"no checkpoint at all"}[damage])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged.*remove it to start anew"):
        Run(recipe(), tmp_path)


def test_export_writes_the_best_rule(uninterrupted: Run[Any, Any], mixed: Recipe, tmp_path: Path) -> None:
    entry = uninterrupted.export(tmp_path)
    assert isinstance(uninterrupted.trainer, MetaTrainer)
    assert entry.name == mixed.name
    assert_same(dict(zoo.load_rule(entry.path).state_dict()), uninterrupted.trainer.best_weights)
    assert entry.meta_training["best_update"] == uninterrupted.trainer.best_update
    (entry.path / "card.md").write_text("# tiny\n\nWritten by hand.\n")
    assert "by hand" in uninterrupted.export(tmp_path).card


def test_nothing_is_exported_before_a_validation(tmp_path: Path) -> None:
    run = Run(recipe(), tmp_path / "run")
    stop_by_time(run)
    with pytest.raises(
        ValueError, match=r"no rule to export yet: the first validation is after update 2, and this run stands at 1"
    ):
        run.export(tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_tensorboard_shows_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for limit in (0.0, float("inf")):  # stopped and continued
        list(Run(recipe(training=replace(SHORT, updates=4)), tmp_path, tensorboard=True).run(limit))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    shown = {event.step: event.value for event in events.Scalars("meta_loss")}
    assert shown == pytest.approx({line["update"]: line["meta_loss"] for line in log}, rel=1e-6)
    assert [event.step for event in events.Scalars("validation")] == [2, 4]


def test_a_few_shot_user_reads_about_few_shot_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"damage")
    with pytest.raises(ValueError, match="is damaged or no checkpoint of a few-shot training run"):
        Run(SINE, tmp_path)
    with pytest.raises(ValueError, match="is damaged or no checkpoint of a meta-training run"):
        Run(recipe(), tmp_path)


def test_a_run_of_another_activity_is_another_run(tmp_path: Path) -> None:
    assert SINE.name == recipe().name
    stop_by_time(Run(recipe(), tmp_path / "meta"))
    with pytest.raises(ValueError, match=r"meta holds another run: it has other settings .*data was None, is 'sinus"):
        Run(SINE, tmp_path / "meta")
    list(Run(SINE, tmp_path / "fewshot").run(time_limit=0.0))
    with pytest.raises(ValueError, match=r"fewshot holds another run: the checkpoint trains None, this run"):
        Run(recipe(), tmp_path / "fewshot")


@pytest.mark.parametrize("made", [SINE, recipe()], ids=lambda made: made.activity)
def test_a_trainer_alone_does_what_a_run_does(made: Any, tmp_path: Path) -> None:
    """A run adds files, and nothing else."""
    trainer = made.trainer()
    alone = [record | {"seconds": 0} for record in trainer.run()]
    run = Run(made, tmp_path)
    assert [record | {"seconds": 0} for record in run.run()] == alone
    again = made.trainer(None, "cpu", run.trainer.state_dict())
    assert again.finished and again.done == trainer.done


class Counter(Trainable):
    """Counts, and looks at the clock."""

    unit: ClassVar[str] = "tick"
    loss: ClassVar[str] = "loss"
    best_score = 0.0
    count = 0
    done = property(lambda self: self.count)
    total = property(lambda self: 300)

    def records(self, stop: Stop) -> Iterator[dict[str, Any]]:
        while not (self.finished or stop()):
            self.count += 1
            yield {"tick": self.count, "loss": 1.0} | ({"validation": 2.0} if self.count == 150 else {})

    def settings(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_a_line_is_said_for_every_hundredth_and_every_validation() -> None:
    said: list[str] = []
    trainer = Counter()
    assert len(list(runs.lines(trainer.run(), trainer, said.append))) == 300
    assert [line.split("  ")[0] for line in said] == ["tick 100", "tick 150", "tick 200", "tick 300"]
    assert re.fullmatch(r"tick 150  loss 1  \d+ s  validation 2", said[1])


def test_the_clock_counts_all_sittings_and_stops_in_time() -> None:
    trainer = Counter()
    trainer.seconds = 100.0
    assert len(list(trainer.run(time_limit=-1.0))) == 0
    (first, *_, last) = trainer.run(stop=lambda: trainer.count >= 5)
    assert 100.0 < first["seconds"] < last["seconds"] and last["tick"] == 5


def test_no_changed_bit_of_a_checkpoint_goes_unnoticed(tmp_path: Path) -> None:
    """Weights are most of a checkpoint, and any number would do for them."""
    for _ in Run(recipe(), tmp_path).run(time_limit=0.0):
        pass
    file = tmp_path / "checkpoint.pt"
    good = file.read_bytes()
    expected = torch.load(io.BytesIO(good), map_location="cpu", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for _ in range(400):
        place = int(torch.randint(8 * len(good), (1,), generator=generator))
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        try:
            found = RunFolder(tmp_path, "meta-training").read_checkpoint()
        except ValueError:
            noticed += 1
        else:  # the mark itself was hit: all before it is as it was
            assert found is not None and repr(found) == repr(expected)
    assert noticed > 390


def test_a_folder_that_a_process_is_at_work_in_is_refused(tmp_path: Path) -> None:
    first = Run(recipe(), tmp_path).run()
    next(first)
    with pytest.raises(ValueError, match=f"another process is at work in {re.escape(str(tmp_path))}"):
        next(Run(recipe(), tmp_path).run())
    first.close()
    assert list(Run(recipe(), tmp_path).run())


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(recipe(), tmp_path)
    run.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
            run.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_recipe_imports_what_lies_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "lies_beside_the_recipe.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text("from lies_beside_the_recipe import VALUE\n")
    assert load_file(tmp_path / "mine.py").VALUE == 7
