"""Entries survive a round trip exactly, and whatever is wrong with one is said."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnedopt import zoo
from learnedopt.meta import start_episode, unroll
from learnedopt.rules import (
    AdamLSTMConfig,
    LSTMConfig,
    LSTMRule,
    MetaLSTMConfig,
    RuleConfig,
    Segments,
    UpdateRule,
    build_rule,
)
from learnedopt.tasks import ConvPool, MLPClassification, Quadratics, TaskFamily
from learnedopt.zoo import ZooEntry, ZooError, entry_info, list_entries, load_rule, rule_fingerprint, save_rule

CONFIGS = [
    LSTMConfig(hidden_size=3, preprocessing_p=7.0, output_scale=0.3),
    MetaLSTMConfig(hidden_size=3, forget_bias=(3.0, 3.5), learner_shapes=((2, 3), (2,))),
    AdamLSTMConfig(hidden_size=3, num_layers=1, nominal_step=0.1),
]
FILES = ["card.md", "config.json", "weights.safetensors"]
SIGMOID = MLPClassification(hidden_sizes=((20,),), activations=("sigmoid",))
RELU = MLPClassification(hidden_sizes=((32, 32),), activations=("relu",), initial_std=None)
SCORES: dict[str, tuple[TaskFamily, float]] = {
    "adam-lstm": (RELU, 0.0237),
    "cifar10": (ConvPool(channels=((4, 4),), hidden=(16,), batch_sizes=(16,)), 0.533),
    "sf-eigen-1": (RELU, 0.00161),
    "sf-adam-1": (RELU, 0.0187),
    "sf-eigen-2": (RELU, 0.00149),
    "sf-adam-2": (RELU, 0.0186),
    "mnist-mlp": (SIGMOID, 0.107),
    "mnist-mlp-curriculum": (RELU, 0.132),
    "quadratic": (Quadratics(entries="gaussian"), 0.00143),
    "quadratic-uniform": (Quadratics(entries="uniform"), 0.00953),
    "rnnprop": (SIGMOID, 0.160),
}
"""For each entry of the zoo a task and the loss it led to when it was made: the geometric mean over 20 copies of the
mean of the last ten of 100 steps."""


def make_rule(config: RuleConfig, generator: torch.Generator) -> UpdateRule:
    """A rule whose every weight is random, those that start at a constant included."""
    rule = build_rule(config)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return rule


def save(rule: UpdateRule, folder: Path, **changes: Any) -> ZooEntry:
    fields: dict[str, Any] = {
        "name": folder.name,
        "description": "A rule for tests.",
        "card": "# A card\n\nFür Menschen.\n",
        "meta_training": {"recipe": "none", "steps": 0, "tasks": ["quadratic"]},
    }
    return save_rule(rule, folder, **{**fields, **changes})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_weights(folder: Path, data: bytes) -> None:
    """Put other weights in, and the sha256 that goes with them: somebody's edit, no accident."""
    (folder / "weights.safetensors").write_bytes(data)
    edit_config(folder, sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def rule(generator: torch.Generator) -> UpdateRule:
    return make_rule(CONFIGS[0], generator)


@pytest.fixture
def entry(rule: UpdateRule, tmp_path: Path) -> ZooEntry:
    return save(rule, tmp_path / "entry")


@pytest.fixture
def shipped(rule: UpdateRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of two entries inside an installed package; returns its folder."""
    package = tmp_path / "site-packages" / "learnedopt"
    monkeypatch.setattr(zoo, "__file__", str(package / "zoo.py"))
    for name in ("quadratic", "default"):
        save(rule, package / "zoo" / name)
    return package / "zoo"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_loaded_rule_is_the_saved_one(config: RuleConfig, tmp_path: Path, generator: torch.Generator) -> None:
    rule = make_rule(config, generator)
    loaded = load_rule(save(rule, tmp_path / "entry").path)
    assert type(loaded) is type(rule) and loaded.config == config
    assert rule_fingerprint(loaded) == rule_fingerprint(rule)

    segments = Segments([3, 2])
    param, grad = torch.randn(2, 5, generator=generator)
    inputs = (param, grad, rule.init_state(segments), segments, torch.tensor(0.7))
    torch.testing.assert_close(loaded.update(*inputs), rule.update(*inputs), rtol=0, atol=0)


def test_a_loaded_rule_is_ready_for_use(entry: ZooEntry) -> None:
    loaded = load_rule(entry.path)
    assert not any(module.training for module in loaded.modules())
    for tensor in loaded.state_dict(keep_vars=True).values():
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.requires_grad


def test_weights_are_stored_in_float32(rule: UpdateRule, tmp_path: Path) -> None:
    expected = rule_fingerprint(rule)
    loaded = load_rule(save(rule.double(), tmp_path / "entry").path)
    assert rule_fingerprint(loaded) == expected


def test_loading_draws_no_random_numbers(entry: ZooEntry) -> None:
    before = torch.get_rng_state()
    load_rule(entry.path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_ignores_the_default_dtype(entry: ZooEntry, rule: UpdateRule) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = load_rule(entry.path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rule_fingerprint(loaded) == rule_fingerprint(rule)


def test_an_entry_is_described_without_its_weights(entry: ZooEntry) -> None:
    (entry.path / "weights.safetensors").unlink()
    info = entry_info(entry.path)
    assert info == entry
    assert info.name == "entry" and info.description == "A rule for tests." and info.config == CONFIGS[0]
    assert info.meta_training == {"recipe": "none", "steps": 0, "tasks": ["quadratic"]}
    assert info.card == "# A card\n\nFür Menschen.\n"


def test_saving_twice_gives_the_same_bytes(rule: UpdateRule, tmp_path: Path) -> None:
    first, second = (save(rule, tmp_path / run / "entry").path for run in ("first", "second"))
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_saving_replaces_an_entry(entry: ZooEntry, tmp_path: Path, generator: torch.Generator) -> None:
    other = make_rule(CONFIGS[2], generator)
    save(other, entry.path)
    assert rule_fingerprint(load_rule(entry.path)) == rule_fingerprint(other)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert sorted(path.name for path in entry.path.iterdir()) == FILES


def test_saving_never_replaces_other_files(rule: UpdateRule, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(ZooError, match="not a zoo entry"):
            save(rule, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_training": {"device": torch.device("cpu")}}, "JSON"),
        ({"meta_training": {"loss": float("nan")}}, "JSON"),
        ({"name": "lstm/quadratic"}, "name"),
        ({"name": ""}, "name"),
        ({"description": "two\nlines"}, "one line"),
        ({"description": " "}, "one line"),
    ],
)
def test_a_save_that_fails_changes_nothing(
    entry: ZooEntry, rule: UpdateRule, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    before = {name: (entry.path / name).read_bytes() for name in FILES}
    for folder in (entry.path, tmp_path / "new"):
        with pytest.raises(ZooError, match=message):
            save(rule, folder, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert {path.name: path.read_bytes() for path in entry.path.iterdir()} == before


def test_a_rule_that_could_not_be_loaded_again_is_not_saved(rule: UpdateRule, tmp_path: Path) -> None:
    class Unregistered(LSTMConfig):
        kind = "unregistered"

    rule.config = Unregistered(hidden_size=3)
    with pytest.raises(ZooError, match="unknown rule kind 'unregistered'"):
        save(rule, tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_not_finite_in_float32_are_not_saved(rule: UpdateRule, tmp_path: Path, value: float) -> None:
    rule = rule.double()
    with torch.no_grad():
        rule.get_parameter("readout.weight")[0, 1] = value
    with pytest.raises(ZooError, match=r"not finite.*\['readout\.weight'\]"):
        save(rule, tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


def test_names_are_listed_in_order(shipped: Path) -> None:
    (shipped / "README.md").write_text("not an entry")
    (shipped / "empty").mkdir()
    assert list_entries() == ["default", "quadratic"]
    assert entry_info("quadratic").path == shipped / "quadratic"


def test_a_checkout_keeps_its_zoo_beside_the_package(shipped: Path) -> None:
    shutil.move(shipped, shipped.parents[1] / "zoo")
    assert list_entries() == ["default", "quadratic"]


def test_an_unknown_name_lists_the_known_ones(shipped: Path) -> None:
    with pytest.raises(ZooError, match=r"no entry 'quadratics'.*mean 'quadratic'.*\['default', 'quadratic'\]"):
        load_rule("quadratics")
    with pytest.raises(ZooError, match="no entry 'xyz'") as raised:
        load_rule("xyz")
    assert "mean" not in str(raised.value)


def test_a_folder_is_found_as_path_and_as_string(
    shipped: Path, rule: UpdateRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = save(rule, tmp_path / "mine").path
    monkeypatch.chdir(tmp_path)
    for spelling in (mine, str(mine), "mine", "./mine", Path("mine")):
        assert entry_info(spelling).path.resolve() == mine
    for missing in ("runs/mine", Path("nowhere")):
        with pytest.raises(ZooError, match=f"no folder '{missing}'"):
            entry_info(missing)


def test_a_folder_never_hides_an_entry_of_the_zoo(
    shipped: Path, rule: UpdateRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = save(rule, tmp_path / "default").path
    monkeypatch.chdir(tmp_path)
    assert entry_info("default").path == shipped / "default"
    assert entry_info("./default").path.resolve() == mine


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_named(entry: ZooEntry, name: str) -> None:
    (entry.path / name).unlink()
    with pytest.raises(ZooError, match=rf"cannot read .*{name}"):
        load_rule(entry.path)


def test_a_missing_card_is_named(entry: ZooEntry) -> None:
    (entry.path / "card.md").unlink()
    with pytest.raises(ZooError, match=r"cannot read .*card\.md"):
        _ = entry.card


@given(data=st.data())
def test_any_damage_to_the_weights_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    entry = save(LSTMRule(LSTMConfig(hidden_size=2)), tmp_path_factory.mktemp("damage") / "entry")
    file = entry.path / "weights.safetensors"
    weights = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(weights) - 1))
    if data.draw(st.booleans(), label="truncate"):
        del weights[place:]
    else:
        weights[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(weights)
    with pytest.raises(ZooError, match=rf"truncated or corrupted: its sha256 is .* says {entry.sha256}"):
        load_rule(entry.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "not valid JSON"),
        ('{"format_version": 1', "not valid JSON"),
        ("[]", "does not describe a zoo entry"),
        ("{}", "no integer 'format_version'"),
        ('{"format_version": 1, "name": "x", "rule": {}}', r"lacks \['description', 'sha256', 'meta_training'\]"),
    ],
)
def test_a_config_that_is_no_config(entry: ZooEntry, text: str, message: str) -> None:
    (entry.path / "config.json").write_text(text)
    with pytest.raises(ZooError, match=message):
        load_rule(entry.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2.*reads up to 1: upgrade"),
        ({"rule": "lstm"}, "'rule' must be a JSON object"),
        ({"sha256": None}, "'sha256' must be a JSON string"),
        ({"rule": {"kind": "gru"}}, "unknown rule kind 'gru'.*known kinds"),
        ({"rule": {"kind": "lstm", "hidden": 3}}, r"unknown setting\(s\) \['hidden'\]"),
        ({"rule": {"kind": "lstm", "hidden_size": 0}}, "hidden_size must be .*at least 1"),
        ({"rule": {"kind": "lstm", "hidden_size": "3"}}, "describes no rule that can be built"),
    ],
)
def test_a_config_with_a_wrong_value(entry: ZooEntry, changes: dict[str, Any], message: str) -> None:
    edit_config(entry.path, **changes)
    with pytest.raises(ZooError, match=message):
        load_rule(entry.path)


@pytest.mark.parametrize("setting", [{"hidden_size": 4}, {"output_scale": 1.0}])
def test_a_config_other_than_the_weights_were_trained_with(entry: ZooEntry, setting: dict[str, Any]) -> None:
    edit_config(entry.path, rule={**CONFIGS[0].to_dict(), **setting})
    with pytest.raises(ZooError, match="does not match the weights beside it"):
        load_rule(entry.path)


def test_tensors_that_do_not_fit_the_config_are_named(entry: ZooEntry, rule: UpdateRule) -> None:
    tensors = rule.state_dict()
    tensors["extra"] = tensors.pop("lstm.biases.1")
    tensors["readout.weight"] = torch.zeros(1, 4)
    metadata = {"rule": json.dumps(rule.config.to_dict())}
    replace_weights(entry.path, safetensors.torch.save(tensors, metadata))
    with pytest.raises(ZooError) as raised:
        load_rule(entry.path)
    message = str(raised.value)
    assert "missing tensors ['lstm.biases.1']" in message
    assert "unexpected tensors ['extra']" in message
    assert "'readout.weight' has shape (1, 4), not (1, 3)" in message


def test_weights_that_are_not_finite_are_not_loaded(entry: ZooEntry, rule: UpdateRule) -> None:
    tensors = rule.state_dict()
    tensors["readout.bias"] = torch.tensor([float("nan")])
    metadata = {"rule": json.dumps(rule.config.to_dict())}
    replace_weights(entry.path, safetensors.torch.save(tensors, metadata))
    with pytest.raises(ZooError, match=r"not finite, in \['readout\.bias'\]"):
        load_rule(entry.path)


def test_weights_of_another_origin_are_refused(entry: ZooEntry, rule: UpdateRule) -> None:
    foreign = [
        b"",
        b"\x80\x04pickled",
        safetensors.torch.save(rule.state_dict()),
        safetensors.torch.save(rule.state_dict(), {"rule": "not JSON"}),
        safetensors.torch.save(rule.state_dict(), {"rule": "[1]"}),
    ]
    for data in foreign:
        replace_weights(entry.path, data)
        with pytest.raises(ZooError, match="not a weight file written by"):
            load_rule(entry.path)


def test_a_fingerprint_is_of_the_rule_alone(rule: UpdateRule, generator: torch.Generator) -> None:
    fingerprint = rule_fingerprint(rule)
    assert rule_fingerprint(rule.eval().requires_grad_(False)) == fingerprint
    twin = LSTMRule(LSTMConfig(hidden_size=3, preprocessing_p=7.0, output_scale=0.31))
    twin.load_state_dict(rule.state_dict())
    assert rule_fingerprint(twin) != fingerprint
    with torch.no_grad():
        bias = rule.get_parameter("readout.bias")
        bias.copy_(torch.nextafter(bias, torch.tensor(1e9)))
    assert rule_fingerprint(rule) != fingerprint


@pytest.mark.parametrize("name", list_entries())
def test_every_entry_of_the_zoo_loads_and_has_a_card(name: str) -> None:
    info = entry_info(name)
    load_rule(name)
    assert info.name == name
    assert info.card.startswith("# ")
    assert info.meta_training


@pytest.mark.parametrize("name", list_entries())
def test_every_entry_of_the_zoo_is_as_good_as_when_it_was_made(name: str, generator: torch.Generator) -> None:
    family, recorded = SCORES[name]
    rule = load_rule(name)
    with torch.no_grad():
        episode = start_episode(rule, family.draw(generator, 20), generator)
        losses, _ = unroll(rule, episode, 100, generator)
    # Rounding differs among machines, and grows on the way.
    assert losses[-10:].mean(0).log().mean().exp().item() == pytest.approx(recorded, rel=0.2)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace('"rule": {', '"rule": ' + DEEP + ', "other": {'), "nested too deep"),
        (lambda text: text.replace('"name":', '"name": "other", "name":'), "the key 'name' is there twice"),
        (lambda text: text.replace('"format_version": 1', '"format_version": true'), "no integer 'format_version'"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 0'), "the first one is 1"),
        (lambda text: text.replace('"hidden_size": 3', '"hidden_size": "3"'), "'hidden_size' must be of the type int"),
        (lambda text: text.replace('"hidden_size": 3', '"hidden_size": true'), "'hidden_size' must be of the type int"),
        (
            lambda text: text.replace('"output_scale": 0.3', '"output_scale": null'),
            "'output_scale' must be of the type",
        ),
    ],
    ids=["deep", "twice", "boolean", "zero", "text", "true", "null"],
)
def test_what_is_odd_in_a_configuration_is_said(entry: ZooEntry, change: Any, problem: str) -> None:
    file = entry.path / "config.json"
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text
    with pytest.raises(ZooError, match=problem):
        load_rule(entry.path)


def test_a_card_that_is_not_text_is_said(entry: ZooEntry) -> None:
    (entry.path / "card.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ZooError, match=r"card.md is not UTF-8 text"):
        _ = entry.card


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64], ids=str)
def test_weights_of_other_types_are_said(entry: ZooEntry, dtype: torch.dtype) -> None:
    data = (entry.path / "weights.safetensors").read_bytes()
    tensors = {name: torch.zeros(value.shape, dtype=dtype) for name, value in safetensors.torch.load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    replace_weights(entry.path, safetensors.torch.save(tensors, header["__metadata__"]))
    with pytest.raises(ZooError, match=rf"is {dtype}, not torch.float32"):
        load_rule(entry.path)


def test_names_that_no_file_can_have_and_links_in_a_circle_are_said(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="File name too long"):
        entry_info("x" * 5000)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ZooError, match="there is no folder"):
        entry_info(tmp_path / "circle")


def test_an_entry_comes_back_where_another_cannot_take_its_place(
    entry: ZooEntry, rule: UpdateRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fails(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no"):
        save(rule, entry.path, description="Another.")
    assert load_rule(entry.path) and entry_info(entry.path).description == "A rule for tests."
