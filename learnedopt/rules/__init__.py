"""What is learned: pure, differentiable update rules.

A new rule is one file beside these and one line in :data:`RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learnedopt.rules.adam_lstm import AdamLSTMConfig, AdamLSTMRule
from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule
from learnedopt.rules.eigenbasis import EigenbasisConfig, EigenbasisRule
from learnedopt.rules.lstm import LSTMConfig, LSTMRule
from learnedopt.rules.meta_lstm import MetaLSTMConfig, MetaLSTMRule
from learnedopt.rules.preprocessing import log_sign
from learnedopt.rules.rnnprop import RNNpropConfig, RNNpropRule
from learnedopt.rules.schedule_free_lstm import ScheduleFreeLSTMConfig, ScheduleFreeLSTMRule
from learnedopt.rules.separate_lstm import SeparateLSTMConfig, SeparateLSTMRule

RULES: dict[str, type[UpdateRule]] = {
    rule.config_class.kind: rule
    for rule in (
        LSTMRule,
        MetaLSTMRule,
        AdamLSTMRule,
        ScheduleFreeLSTMRule,
        EigenbasisRule,
        RNNpropRule,
        SeparateLSTMRule,
    )
}


def build_rule(config: RuleConfig | Mapping[str, Any]) -> UpdateRule:
    """A rule with fresh weights, from its configuration or the dictionary that describes one.

    Raises:
        ValueError: the kind is not registered, or a setting is unknown or out of range.

    >>> build_rule({"kind": "lstm", "hidden_size": 8}).config.hidden_size
    8
    """
    kind = config.kind if isinstance(config, RuleConfig) else config.get("kind")
    if kind not in RULES:
        raise ValueError(f"unknown rule kind {kind!r}; known kinds: {sorted(RULES)}")
    rule_class = RULES[kind]
    return rule_class(config if isinstance(config, RuleConfig) else rule_class.config_class.from_dict(config))


__all__ = [
    "RULES",
    "AdamLSTMConfig",
    "AdamLSTMRule",
    "EigenbasisConfig",
    "EigenbasisRule",
    "LSTMConfig",
    "LSTMRule",
    "MetaLSTMConfig",
    "MetaLSTMRule",
    "RNNpropConfig",
    "RNNpropRule",
    "RuleConfig",
    "ScheduleFreeLSTMConfig",
    "ScheduleFreeLSTMRule",
    "Segments",
    "SeparateLSTMConfig",
    "SeparateLSTMRule",
    "State",
    "StateSpec",
    "UpdateRule",
    "build_rule",
    "log_sign",
]
