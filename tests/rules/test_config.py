"""A rule is rebuilt from its configuration, for every rule in the registry."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

import pytest
import torch

from learnedopt.rules import RULES, LSTMConfig, MetaLSTMConfig, MetaLSTMRule, RuleConfig, build_rule
from tests.rules.support import KINDS, VARIANTS


def config_of(values: dict[str, Any]) -> RuleConfig:
    return RULES[values["kind"]].config_class.from_dict(values)


@pytest.mark.parametrize("values", VARIANTS)
def test_round_trip_through_json(values: dict[str, Any]) -> None:
    config = config_of(values)
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.to_dict()["kind"] == values["kind"]
    assert values.items() <= config.to_dict().items()


def test_tuples_come_back_from_json() -> None:
    config = MetaLSTMConfig(learner_shapes=((2, 3), (3,)), forget_bias=(1.0, 2.0))
    again = MetaLSTMConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.learner_shapes[0], tuple)
    rule = build_rule(again)
    assert isinstance(rule, MetaLSTMRule)
    assert rule.initial_params is not None


@pytest.mark.parametrize("values", VARIANTS)
def test_a_rule_is_rebuilt_with_its_weights(values: dict[str, Any]) -> None:
    rule = build_rule(values)
    again = build_rule(json.loads(json.dumps(rule.config.to_dict())))
    assert type(again) is RULES[values["kind"]]
    assert again.config == rule.config
    again.load_state_dict(rule.state_dict())
    for name, weight in again.named_parameters():
        assert torch.equal(weight, rule.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_without_configuration_has_the_defaults(kind: str) -> None:
    assert RULES[kind]().config == RULES[kind].config_class()  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_are_frozen(kind: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of({"kind": kind}).hidden_size = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("values", [{"kind": "lsmt"}, {"kind": None}, {}], ids=str)
def test_an_unknown_kind_names_the_known_ones(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown rule kind .* known kinds: \['adam_lstm', 'chain', 'in_eigenbases'"):
        build_rule(values)


def test_a_configuration_of_no_registered_rule_is_refused() -> None:
    class Stranger(RuleConfig):
        kind: ClassVar[str] = "stranger"

    with pytest.raises(ValueError, match="unknown rule kind 'stranger'"):
        build_rule(Stranger())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_setting_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"unknown setting\(s\) \['hiden_size'\].*known: \['"):
        build_rule({"kind": kind, "hiden_size": 3})


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_of_another_kind_is_refused(kind: str) -> None:
    other = next(name for name in KINDS if name != kind)
    with pytest.raises(ValueError, match=f"is for rule kind '{other}', not '{kind}'"):
        RULES[kind].config_class.from_dict({"kind": other})
    with pytest.raises(TypeError, match="is configured by"):
        RULES[kind](config_of({"kind": other}))


def test_from_dict_leaves_its_argument_alone() -> None:
    values = {"kind": "lstm", "hidden_size": 3}
    LSTMConfig.from_dict(values)
    assert values == {"kind": "lstm", "hidden_size": 3}
