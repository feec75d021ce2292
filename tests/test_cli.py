"""The command line, every command as a user types it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import learnedopt
from learnedopt import demo, zoo
from learnedopt.cli import demos, main
from learnedopt.data import digits
from learnedopt.fewshot import learner_info, list_learners
from learnedopt.meta import load_recipe
from learnedopt.optim import LearnedOptimizer
from learnedopt.rules import AdamLSTMConfig, AdamLSTMRule, LSTMConfig, LSTMRule
from learnedopt.zoo import list_entries, load_rule, rule_fingerprint

ROOT = Path(__file__).resolve().parents[1]
Captured = pytest.CaptureFixture[str]

RECIPE = """
import os, signal
from learnedopt.meta import MetaTrainConfig, Recipe
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Quadratics

class Family(Quadratics):
    def draw(self, generator, copies):
        {on_draw}
        return super().draw(generator, copies)

RECIPE = Recipe(
    name="tiny",
    description="A rule for tests.",
    tasks="quadratics in 3 dimensions",
    rule=LSTMConfig(hidden_size=3),
    training=MetaTrainConfig(
        updates={updates}, unroll_length=2, horizon=(4, 4), validate_every={validate_every}, validation_horizon=4,
        {more}
    ),
    family=lambda root: Family(dimension=3),
)
"""


def write_recipe(folder: Path, updates: int = 6, validate_every: int = 3, on_draw: str = "pass", more: str = "") -> str:
    file = folder / "tiny.py"
    file.write_text(RECIPE.format(updates=updates, validate_every=validate_every, on_draw=on_draw, more=more))
    return str(file)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands write to the folder they are run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of small untrained rules in place of the shipped one."""
    folder = tmp_path / "own-zoo"
    for name, rule in (
        ("default", AdamLSTMRule(AdamLSTMConfig(hidden_size=2))),
        ("mnist-mlp", LSTMRule(LSTMConfig(hidden_size=2))),
    ):
        zoo.save_rule(
            rule,
            folder / name,
            name=name,
            description=f"About {name}.",
            card=f"# {name}\n",
            meta_training={"updates": 0},
        )
    monkeypatch.setattr(zoo, "root", lambda: folder)
    return folder


def test_the_version_is_the_packages(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"learnedopt {learnedopt.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []], ids=str)
def test_help_needs_no_torch(arguments: list[str]) -> None:
    """Which takes seconds to import. Nothing of the package is imported but what the help is made of."""
    code = f"""
import sys
from learnedopt.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(sorted(name for name in sys.modules if name == "torch" or name.startswith("learnedopt.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "['learnedopt.cli']"


def test_the_package_has_what_it_names() -> None:
    for name in (*learnedopt.__all__, "rules", "kernels", "zoo", "optim", "storage"):
        assert getattr(learnedopt, name) is not None and name in dir(learnedopt)
    with pytest.raises(AttributeError, match="module 'learnedopt' has no attribute 'Adam'"):
        learnedopt.Adam  # noqa: B018


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-W", "error", "-m", "learnedopt", "zoo", "show", "no-such-entry"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: the zoo has no entry 'no-such-entry'")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["zoo"], ["meta-train"], ["no-such-command"]])
def test_an_incomplete_command_shows_how_it_is_used(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: learnedopt" in capsys.readouterr().err


def test_zoo_list_names_every_shipped_entry(capsys: Captured) -> None:
    assert main(["zoo", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_entries() + list_learners()


@pytest.mark.parametrize("name", list_entries())
def test_zoo_show_tells_what_is_known_of_a_shipped_entry(name: str, capsys: Captured) -> None:
    assert main(["zoo", "show", name]) == 0
    entry, output = zoo.entry_info(name), capsys.readouterr().out
    assert entry.sha256 in output
    assert LearnedOptimizer([torch.zeros(1, requires_grad=True)], rule=name).param_groups[0]["rule_sha256"] in output
    assert entry.card.strip() in output
    assert all(f"{key}={value}" in output for key, value in entry.config.to_dict().items())


@pytest.mark.parametrize("name", list_learners())
def test_zoo_show_tells_what_is_known_of_a_shipped_learner(name: str, capsys: Captured) -> None:
    assert main(["zoo", "show", name]) == 0
    entry, output = learner_info(name), capsys.readouterr().out
    assert entry.sha256 in output and entry.card.strip() in output
    assert f"kind={entry.learner.kind}" in output and f"kind={entry.backbone.kind}" in output
    assert main(["zoo", "show", str(entry.path)]) == 0, "by its folder too"
    assert capsys.readouterr().out == output


def test_a_learner_of_the_zoo_is_trained_again_by_its_recipe(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(ROOT)  # where the recipes are
    again = ["zoo", "train", "omniglot-protonet-1shot", "--out", str(elsewhere / "run")]
    assert main([*again, "--resume"]) == 2
    assert "there is no run to resume" in capsys.readouterr().err
    assert main([*again, "--training.steps", "5"]) == 2
    assert "is a few-shot learner, and settings of its recipe cannot be replaced here" in capsys.readouterr().err
    assert main([*again, "--root", str(elsewhere)]) == 2
    assert "no Omniglot under" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "learnedopt", "zoo", "show", "default"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_zoo_show_verifies_the_weights(own_zoo: Path, capsys: Captured) -> None:
    assert main(["zoo", "list"]) == 0
    assert capsys.readouterr().out == "default    About default.\nmnist-mlp  About mnist-mlp.\n"
    assert main(["zoo", "show", str(own_zoo / "default")]) == 0
    assert "44 bytes per parameter" in capsys.readouterr().out
    weights = own_zoo / "default" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["zoo", "show", "default"]) == 2
    assert "truncated or corrupted" in capsys.readouterr().err


def test_meta_training_runs_to_the_end_and_exports(elsewhere: Path, capsys: Captured) -> None:
    assert main(["meta-train", write_recipe(elsewhere), "--export", "zoo"]) == 0
    output = capsys.readouterr().out
    assert "tiny: update 0 of 6, in runs/tiny" in output
    assert re.search(r"update 3  meta-loss \S+  \S+ updates/s  \d+ inner steps/s  \d+ min left  validation \S+", output)
    assert "exported to zoo/tiny" in output
    assert load_rule("zoo/tiny").config == LSTMConfig(hidden_size=3)
    assert {path.name for path in (elsewhere / "runs/tiny").iterdir()} == {"checkpoint.pt", "config.json", "log.jsonl"}


def test_meta_training_continues_to_the_same_weights(elsewhere: Path, capsys: Captured) -> None:
    recipe = write_recipe(elsewhere)
    assert main(["meta-train", recipe, "--out", "whole"]) == 0
    capsys.readouterr()
    for update in range(1, 6):
        assert main(["meta-train", recipe, "--out", "parts", "--time-limit", "0"]) == 0
        output = capsys.readouterr().out
        assert f"stopped at update {update}, all of it saved; continue with: learnedopt meta-train" in output
        assert "--out parts" in output
    assert main(["meta-train", recipe, "--out", "parts"]) == 0
    assert "stopped" not in capsys.readouterr().out

    # Both had finished before: this time they are only exported.
    for folder in ("whole", "parts"):
        assert main(["meta-train", recipe, "--out", folder, "--export", f"zoo-of-{folder}"]) == 0
    whole, parts = (load_rule(f"zoo-of-{folder}/tiny") for folder in ("whole", "parts"))
    assert rule_fingerprint(whole) == rule_fingerprint(parts)
    checkpoints = [torch.load(f"{folder}/checkpoint.pt")["trainer"]["rule"] for folder in ("whole", "parts")]
    assert all(torch.equal(checkpoints[0][name], checkpoints[1][name]) for name in checkpoints[0])


def test_an_entry_of_the_zoo_is_trained_again_in_several_sittings(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(ROOT)  # where the recipes are
    options = ["--training.copies", "2", "--time-limit", "0", "--out", str(elsewhere / "run")]
    again = ["zoo", "train", "quadratic", *options]
    assert main([*again, "--resume"]) == 2
    assert "there is no run to resume" in capsys.readouterr().err
    assert main(again) == 0
    output = capsys.readouterr().out
    assert "stopped at update 1, all of it saved" in output
    folder = elsewhere / "run"
    told = f"continue with: learnedopt zoo train quadratic --out {folder} --resume --training.copies 2"
    assert told in output and "meta-train" not in output
    assert main(again) == 2
    assert "holds a run already: go on with it by --resume" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert "stopped at update 2, all of it saved" in capsys.readouterr().out
    assert main(["zoo", "train", "nothing", *options]) == 2
    assert "the zoo has no entry 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_updates(number: signal.Signals, elsewhere: Path, capsys: Captured) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    recipe = write_recipe(elsewhere, updates=1000, on_draw=f"os.kill(os.getpid(), {int(number)})")
    assert main(["meta-train", recipe, "--export", "zoo"]) == 128 + number
    output = capsys.readouterr().out
    assert "stopped at update 1, all of it saved" in output
    assert not (elsewhere / "zoo").exists()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers

    write_recipe(elsewhere, updates=1000)
    assert main(["meta-train", recipe, "--time-limit", "0"]) == 0
    assert "stopped at update 2" in capsys.readouterr().out


def test_a_rule_that_was_never_validated_is_not_exported(elsewhere: Path, capsys: Captured) -> None:
    recipe = write_recipe(elsewhere)
    assert main(["meta-train", recipe, "--time-limit", "0", "--export", "zoo"]) == 2
    captured = capsys.readouterr()
    assert "stopped at update 1" in captured.out
    assert captured.err.startswith(
        "error: there is no rule to export yet: the first validation is after update 3, and this run stands at 1. The "
        "same command goes on"
    )


@pytest.mark.parametrize("name", list_entries())
def test_the_recipe_that_an_entry_names_exists(name: str) -> None:
    assert (ROOT / zoo.entry_info(name).meta_training["recipe"]).is_file()


@pytest.mark.parametrize(
    ("recipe", "told"),
    [("mine/tiny.py", "mine/tiny.py"), (ROOT / "meta_training/trials/default_pes.py", None)],
    ids=["own", "trial"],
)
def test_an_entry_names_the_recipe_that_made_it(elsewhere: Path, recipe: Path | str, told: str | None) -> None:
    (elsewhere / "mine").mkdir()
    write_recipe(elsewhere / "mine")
    found = load_recipe(recipe)
    assert found.file == (told or "meta_training/trials/default_pes.py")
    if told:
        assert main(["meta-train", str(recipe), "--export", "zoo"]) == 0
        assert zoo.entry_info("zoo/tiny").meta_training["recipe"] == told


def test_a_name_that_no_entry_can_have_is_refused_before_training(elsewhere: Path, capsys: Captured) -> None:
    recipe = write_recipe(elsewhere)
    Path(recipe).write_text(Path(recipe).read_text().replace('name="tiny"', 'name="ti/ny"'))
    assert main(["meta-train", recipe, "--out", "run", "--export", "zoo"]) == 2
    assert "an entry's name is one word without path separators, got 'ti/ny'" in capsys.readouterr().err
    assert not Path("run").exists()


def test_meta_training_that_fails_says_on_which_task(elsewhere: Path, capsys: Captured) -> None:
    recipe = write_recipe(elsewhere, on_draw="self.__dict__['initial_std'] = float('nan')", more="max_skipped=1")
    assert main(["meta-train", recipe]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 2 windows had a non-finite meta-loss")
    assert "Quadratic(dimension=3)" in error
    assert error.count("\n") == 1


def test_mistakes_are_one_line_without_a_traceback(elsewhere: Path, capsys: Captured) -> None:
    (elsewhere / "empty.py").touch()
    (elsewhere / "needs.py").write_text("import no_such_module\n")
    recipe = write_recipe(elsewhere)
    assert main(["meta-train", recipe, "--time-limit", "0"]) == 0
    write_recipe(elsewhere, updates=7)
    capsys.readouterr()
    for arguments, message in (
        (["zoo", "show", "nothing"], "the zoo has no entry 'nothing'"),
        (["meta-train", recipe, "--device", "nowhere"], "cannot train on device 'nowhere'"),
        (["meta-train", "nothing"], "no recipe 'nothing': meta_training/nothing.py does not exist"),
        (["meta-train", "empty.py"], "empty.py must define RECIPE"),
        (["meta-train", "needs.py"], "No module named 'no_such_module'"),
        (
            ["meta-train", recipe],
            "runs/tiny holds another run: the checkpoint was made with other settings: ['updates']",
        ),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {message}")
        assert captured.err.count("\n") == 1


SMALL = demo.Demo(
    networks=(("sigmoid", (64, 4, 10)), ("relu", (64, 4, 4, 10))),
    steps=3,
    batch_size=8,
    seeds=(0, 1),
    tuning_seeds=(2,),
    adam_rates=(1e-3, 1e-2),
    sgd_rates=(1e-2, 1e-1, 1e30),
    evaluate_every=2,
)


def test_the_demo_prints_a_table_per_network_and_draws_the_curves(
    own_zoo: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(demos, "Demo", lambda: SMALL)
    monkeypatch.setattr("learnedopt.runs.progress._EVERY", 0.0)
    assert main(["demo", "--out", "curves.png"]) == 0
    output, progress = capsys.readouterr()
    shares = [int(share) for share in re.findall(r"^(\d+) %, \d+ s left$", progress, re.MULTILINE)]
    assert len(shares) == demo.count(SMALL) - 1 and shares == sorted(shares)
    for title in ("sigmoid network 64-4-10", "relu network 64-4-4-10"):
        assert title in output
    for label in ("LearnedOptimizer, untuned", "Andrychowicz LSTM (mnist-mlp)", "Adam, default (lr 0.001)"):
        assert output.count(label) == 2
    assert len(re.findall(r"Adam, tuned \(lr 0\.01\)  .*\d\.\d{4} \[.* %  +\d+\.\d\d", output)) == 2
    assert len(re.findall(r"SGD momentum 0\.9, tuned \(lr 0\.0?1\)", output)) == 2
    assert "Curves: curves.png" in output
    assert (elsewhere / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_is_the_same_every_time_and_pairs_its_runs(own_zoo: Path) -> None:
    global_state = torch.random.get_rng_state()
    first, second = (demo.compare(SMALL, "relu", (64, 4, 10)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert [row.label for row in first.rows] == [row.label for row in second.rows]
    for row, again in zip(first.rows, second.rows):
        for run, other in zip(row.runs, again.runs):
            assert (run.losses, run.test_loss, run.test_accuracy) == (
                other.losses,
                other.test_loss,
                other.test_accuracy,
            )
    for index in range(len(SMALL.seeds)):
        assert len({row.runs[index].losses[0] for row in first.rows}) == 1
    assert first.rows[0].runs[0].losses[0] != first.rows[0].runs[1].losses[0]
    assert first.rows[0].runs[0].steps == (0, 2, 3)


def test_the_demo_survives_a_run_that_diverges(own_zoo: Path, elsewhere: Path) -> None:
    network = demo.build_network("relu", (64, 4, 10), seed=0)
    run = demo.train(SMALL, network, torch.optim.SGD(network.parameters(), lr=1e30), digits(), seed=0)
    assert run.losses[-1] == float("inf")
    panel = demo.Panel("diverged", (demo.Row("SGD", (run,)),))
    assert "inf [inf, inf]" in demo.table(panel)
    demo.plot([panel], elsewhere / "curves.png")
    assert (elsewhere / "curves.png").exists()


def test_zoo_show_counts_the_matrices_of_rules_with_bases(capsys: Captured) -> None:
    assert main(["zoo", "show", "default"]) == 0
    assert "12 bytes per parameter in float32, and 16 more in matrices that are square" in capsys.readouterr().out


OWN_KIND = """
from dataclasses import dataclass
from typing import ClassVar
from learnedopt.rules import RULES, LSTMConfig, LSTMRule

@dataclass(frozen=True)
class TinyConfig(LSTMConfig):
    kind: ClassVar[str] = "tiny-own-kind"

class TinyRule(LSTMRule):
    config_class = TinyConfig

RULES["tiny-own-kind"] = TinyRule
"""


def test_a_rule_of_ones_own_kind_is_known_after_an_import(elsewhere: Path) -> None:
    """In processes of their own: what was imported once stays known."""
    (elsewhere / "own_kind.py").write_text(OWN_KIND)
    save = """
from learnedopt.zoo import save_rule
for rule, name in ((build(), "one"),):
    save_rule(rule, "entries/" + name, name=name, description="Mine.", card="# Mine", meta_training={})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)

    build = "from own_kind import TinyRule, TinyConfig\nbuild = lambda: TinyRule(TinyConfig(hidden_size=2))\n"
    made = python("-c", "import sys; sys.path.append('.')\n" + build + save)
    assert made.returncode == 0, made.stderr
    show = ["-m", "learnedopt", "zoo", "show", "./entries/one"]
    unknown = python(*show)
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1
    assert "'tiny-own-kind'" in unknown.stderr
    assert "It was defined in own_kind: import that first (--import own_kind)" in unknown.stderr
    for known in (["--import", "own_kind.py"], ["--import=own_kind"]):
        shown = python(*show, *known)
        assert shown.returncode == 0 and "kind=tiny-own-kind" in shown.stdout, shown.stderr
    missing = python(*show, "--import", "other.py")
    assert missing.returncode == 2 and "there is no Python file 'other.py' to import" in missing.stderr
