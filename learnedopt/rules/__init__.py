"""What is learned: pure, differentiable update rules.

A new rule is one file beside these and one line in :data:`RULES`.
"""

from __future__ import annotations

from learnedopt.rules.adam_lstm import AdamLSTMConfig, AdamLSTMRule
from learnedopt.rules.base import RULES, RuleConfig, Segments, State, StateSpec, UpdateRule, build_rule
from learnedopt.rules.chain import ChainConfig, ChainRule
from learnedopt.rules.coordinates import Coordinates
from learnedopt.rules.eigenbasis import InEigenbases, InEigenbasesConfig
from learnedopt.rules.laws import LawsConfig, LawsRule
from learnedopt.rules.lstm import LSTMConfig, LSTMRule
from learnedopt.rules.meta_lstm import MetaLSTMConfig, MetaLSTMRule
from learnedopt.rules.modulators import CoordinateLSTM, Modulator, ModulatorConfig, PowerLaws, TensorController
from learnedopt.rules.normalized import NormalizedGradientConfig, NormalizedGradientRule
from learnedopt.rules.preprocessing import log_sign
from learnedopt.rules.rnnprop import RNNpropConfig, RNNpropRule
from learnedopt.rules.schedule_free import ScheduleFreeConfig, ScheduleFreeRule
from learnedopt.rules.separate_lstm import SeparateLSTMConfig, SeparateLSTMRule

_ALL: tuple[type[UpdateRule], ...] = (
    LSTMRule,
    MetaLSTMRule,
    AdamLSTMRule,
    ScheduleFreeRule,
    InEigenbases,
    RNNpropRule,
    SeparateLSTMRule,
    NormalizedGradientRule,
    LawsRule,
    ChainRule,
)
RULES.update({rule.config_class.kind: rule for rule in _ALL})

__all__ = [
    "RULES",
    "AdamLSTMConfig",
    "AdamLSTMRule",
    "ChainConfig",
    "ChainRule",
    "CoordinateLSTM",
    "Coordinates",
    "InEigenbases",
    "InEigenbasesConfig",
    "LSTMConfig",
    "LSTMRule",
    "LawsConfig",
    "LawsRule",
    "MetaLSTMConfig",
    "MetaLSTMRule",
    "Modulator",
    "ModulatorConfig",
    "NormalizedGradientConfig",
    "NormalizedGradientRule",
    "PowerLaws",
    "RNNpropConfig",
    "RNNpropRule",
    "RuleConfig",
    "ScheduleFreeConfig",
    "ScheduleFreeRule",
    "Segments",
    "SeparateLSTMConfig",
    "SeparateLSTMRule",
    "State",
    "StateSpec",
    "TensorController",
    "UpdateRule",
    "build_rule",
    "log_sign",
]
