"""What the tests of the rules share: one table of rules, rules with random weights, and random runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from learnedopt.rules import (
    RULES,
    ChainConfig,
    CoordinateLSTM,
    InEigenbasesConfig,
    LawsConfig,
    NormalizedGradientConfig,
    ScheduleFreeConfig,
    Segments,
    State,
    UpdateRule,
    build_rule,
)

KINDS = sorted(RULES)

# Every registered rule as it comes, and the options that take another path.
VARIANTS = [
    *(pytest.param({"kind": kind}, id=kind) for kind in KINDS),
    pytest.param({"kind": "lstm", "num_layers": 1, "hidden_size": 3, "output_scale": 2.0}, id="lstm-small"),
    pytest.param({"kind": "lstm", "preprocessing": "identity", "hidden_size": 4}, id="lstm-identity"),
    pytest.param({"kind": "lstm", "preprocessing_p": 2.0, "num_layers": 3, "hidden_size": 4}, id="lstm-p"),
    pytest.param({"kind": "meta_lstm", "gate_feedback": "preactivation"}, id="meta_lstm-preactivation"),
    pytest.param({"kind": "meta_lstm", "gradient_divisor": 25.0, "preprocessing_p": 7.0}, id="meta_lstm-divisor"),
    pytest.param({"kind": "adam_lstm", "num_layers": 1, "hidden_size": 4, "max_time": 3.0}, id="adam_lstm-small"),
    pytest.param(
        {
            "kind": "adam_lstm",
            "fast_decay": 0.0,
            "slow_decay": 0.5,
            "square_decay": 0.98,
            "eps": 1e-3,
            "mix_bound": 0.5,
        },
        id="adam_lstm-decays",
    ),
    pytest.param(
        {
            "kind": "schedule_free",
            "modulator": {"kind": "lstm_of_coordinates", "num_layers": 1, "hidden_size": 4},
            "max_time": 3.0,
            "averaging_power": 0.0,
        },
        id="schedule_free-small",
    ),
    pytest.param(
        {
            "kind": "in_eigenbases",
            "inner": ScheduleFreeConfig(CoordinateLSTM(hidden_size=4), square_decay=0.99).to_dict(),
        },
        id="in_eigenbases-lstm",
    ),
    pytest.param(
        {
            "kind": "schedule_free",
            "modulator": {"kind": "controller_of_tensors", "units": 3, "of_coordinates": {"kind": "power_laws"}},
        },
        id="schedule_free-controller",
    ),
    pytest.param(
        {
            "kind": "schedule_free",
            "modulator": {"kind": "lstm_of_coordinates", "num_layers": 2, "hidden_size": 8},
            "momentum_decay": 0.5,
            "square_decay": 0.98,
            "eps": 1e-3,
            "interpolation": 0.5,
            "log_averaging_bound": 0.5,
        },
        id="schedule_free-decays",
    ),
    pytest.param(
        {"kind": "normalized_gradient", "square_decay": 0.9, "eps": 1e-3, "relative_eps": 0.5}, id="normalized-floor"
    ),
    pytest.param(
        {
            "kind": "laws",
            "interpolation": 0.5,
            "settling_time": 2.0,
            "settling_power": 0.5,
            "averaging_power": 1.0,
            "log_averaging_bound": 0.5,
            "max_time": 3.0,
        },
        id="laws-settling",
    ),
    pytest.param(
        ChainConfig(
            InEigenbasesConfig(NormalizedGradientConfig(relative_eps=0.1), blocks=True, threshold=0.0),
            LawsConfig(settling_time=2.0),
        ).to_dict(),
        id="chain-in-bases",
    ),
    pytest.param(
        {
            "kind": "rnnprop",
            "hidden_size": 3,
            "num_layers": 1,
            "momentum_decay": 0.0,
            "square_decay": 0.98,
            "eps": 1e-3,
        },
        id="rnnprop-decays",
    ),
]

# Derandomised, so that a run is the same wherever it happens.
property_test = settings(deadline=None, max_examples=25, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rule(
    config: dict[str, Any] | str, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 0.4
) -> UpdateRule:
    """A rule all of whose weights, read-outs and biases included, are drawn from N(0, scale²)."""
    rule = build_rule({"kind": config} if isinstance(config, str) else config).to(dtype)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.normal_(0.0, scale, generator=generator(seed))
            seed += 1
    return rule


class Advancing(nn.Module):
    """A rule whose call is ``advance``, since only calls can be given other weights."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, State]:
        return self.rule.advance(*args, **kwargs)


def small(config: dict[str, Any], units: int) -> dict[str, Any]:
    """The configuration with LSTMs of so many units, where it has any."""
    fields = {field.name for field in dataclasses.fields(RULES[config["kind"]].config_class)}
    return {**config, "hidden_size": units} if "hidden_size" in fields else config


def random_values(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of either sign with magnitudes from 1e-6 to 10, so that both branches of the preprocessing occur."""
    sign = torch.randn(*shape, generator=generator(seed), dtype=torch.float64).sign()
    exponent = torch.empty(*shape, dtype=torch.float64).uniform_(-6.0, 1.0, generator=generator(seed + 1))
    return (sign * 10.0**exponent).to(dtype)


def run(
    rule: UpdateRule, segments: Segments, params: Tensor, grads: Tensor, losses: Tensor | None = None
) -> tuple[Tensor, State]:
    """Every update of a run along given parameters and gradients, ``(T, N)``, and the state at its end.

    Losses are ``(T,)`` or ``(T, copies)``, and all one where none are given.
    """
    if losses is None:
        losses = params.new_ones(len(params))
    state = rule.init_state(segments, dtype=params.dtype, param=params[0])
    deltas = []
    for param, grad, loss in zip(params, grads, losses):
        delta, state = rule.update(param, grad, state, segments, loss)
        deltas.append(delta)
    return torch.stack(deltas), state
