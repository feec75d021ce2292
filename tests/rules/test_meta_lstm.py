from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from learnedopt.rules import MetaLSTMConfig, MetaLSTMRule, Segments
from tests.rules.support import random_rule, random_values, run


def test_fresh_weights_are_within_the_ranges_of_the_paper() -> None:
    forget, input_ = [], []
    for _ in range(20):
        rule = MetaLSTMRule()
        forget.append(rule.forget_gate.bias.item())
        input_.append(rule.input_gate.bias.item())
        others = [
            weight for name, weight in rule.named_parameters() if name not in {"forget_gate.bias", "input_gate.bias"}
        ]
        for weight in others:
            assert 0.0 < weight.abs().max() <= 0.01
    assert all(4.0 <= bias <= 5.0 for bias in forget)
    assert all(-5.0 <= bias <= -4.0 for bias in input_)
    assert len(set(forget)) > 1
    assert len(set(input_)) > 1


def test_fresh_it_is_gradient_descent_with_a_small_step_and_little_decay() -> None:
    rule, segments = MetaLSTMRule(), Segments([4])
    params, grads = torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 0.1, -3.0]])
    with torch.no_grad():
        steps = -run(rule, segments, params, grads)[0] / grads
        decay = -run(rule, segments, torch.ones(1, 4), torch.zeros(1, 4))[0]
    # sigmoid(±4) and sigmoid(±5), with room for the other weights.
    assert ((steps > 0.0055) & (steps < 0.022)).all()
    assert ((decay > 0.0055) & (decay < 0.022)).all()


def test_the_loss_is_read() -> None:
    rule, segments = random_rule("meta_lstm"), Segments([3])
    params, grads = random_values((3, 3), 0), random_values((3, 3), 2)
    with torch.no_grad():
        small, _ = run(rule, segments, params, grads, torch.full((3,), 0.1, dtype=torch.float64))
        large, _ = run(rule, segments, params, grads, torch.full((3,), 10.0, dtype=torch.float64))
    assert not torch.allclose(small, large, rtol=1e-3)


def test_one_loss_serves_every_copy() -> None:
    rule, segments = random_rule("meta_lstm"), Segments([1, 2], copies=2)
    params, grads = random_values((3, 6), 0), random_values((3, 6), 2)
    with torch.no_grad():
        scalar, _ = run(rule, segments, params, grads, torch.full((3,), 2.0, dtype=torch.float64))
        copied, _ = run(rule, segments, params, grads, torch.full((3, 2), 2.0, dtype=torch.float64))
    assert torch.equal(scalar, copied)


def test_a_missing_loss_is_named() -> None:
    rule, segments = MetaLSTMRule(), Segments([2])
    with pytest.raises(ValueError, match="reads the training loss at every step, and none was given"):
        rule.update(torch.zeros(2), torch.zeros(2), rule.init_state(segments), segments)


def test_a_loss_per_example_is_refused() -> None:
    rule, segments = MetaLSTMRule(), Segments([2], copies=2)
    with pytest.raises(ValueError, match="a scalar or one per copy"):
        rule.update(torch.zeros(4), torch.zeros(4), rule.init_state(segments), segments, torch.zeros(5))


def test_gradients_are_divided_first() -> None:
    segments, params, grads = Segments([3]), random_values((3, 3), 0), random_values((3, 3), 2)
    with torch.no_grad():
        divided, _ = run(random_rule({"kind": "meta_lstm", "gradient_divisor": 5.0}), segments, params, grads)
        plain, _ = run(random_rule("meta_lstm"), segments, params, grads / 5.0)
    assert torch.equal(divided, plain)


def test_feedback_differs_from_the_second_step_on() -> None:
    segments, params, grads = Segments([3]), random_values((2, 3), 0), random_values((2, 3), 2)
    with torch.no_grad():
        gate, _ = run(random_rule("meta_lstm"), segments, params, grads)
        code, _ = run(random_rule({"kind": "meta_lstm", "gate_feedback": "preactivation"}), segments, params, grads)
    assert torch.equal(gate[0], code[0])
    assert not torch.allclose(gate[1], code[1], rtol=1e-4)


def test_initial_params_have_the_learners_shapes_and_learn() -> None:
    shapes = ((2, 3), (3,), (), (0, 4))
    rule = MetaLSTMRule(MetaLSTMConfig(learner_shapes=shapes))
    assert rule.c0 is not None
    with torch.no_grad():
        rule.c0.copy_(torch.arange(10.0))
    params = rule.initial_params
    assert params is not None
    assert [tuple(param.shape) for param in params] == list(shapes)
    assert torch.equal(torch.cat([param.flatten() for param in params]), torch.arange(10.0))
    torch.cat([param.flatten() for param in params]).square().sum().backward()
    torch.testing.assert_close(rule.c0.grad, 2 * torch.arange(10.0))


def test_initial_params_are_none_where_none_are_learned() -> None:
    rule = MetaLSTMRule()
    assert rule.initial_params is None
    assert "c0" not in rule.state_dict()


@pytest.mark.parametrize(
    "setting",
    [
        {"gate_feedback": "none"},
        {"gradient_divisor": 0.0},
        {"gradient_divisor": math.inf},
        {"preprocessing_p": -1.0},
        {"init_bound": -0.1},
        {"forget_bias": (5.0, 4.0)},
        {"input_bias": (1.0,)},
        {"input_bias": (math.nan, 0.0)},
        {"learner_shapes": ((2, -1),)},
        {"hidden_size": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        MetaLSTMRule(dataclasses.replace(MetaLSTMConfig(), **setting))
