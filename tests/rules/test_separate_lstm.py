"""What tells the rule of two LSTMs from one of them alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.kernels import ReferenceBackend, StepOptions, Tensors, step
from learnedopt.meta.evolution import PerCopy, flat_weights
from learnedopt.rules import LSTMRule, Segments, SeparateLSTMConfig, SeparateLSTMRule
from tests.rules.support import random_rule, random_values, run


def make_rule() -> SeparateLSTMRule:
    rule = random_rule({"kind": "separate_lstm", "hidden_size": 3}, torch.float32)
    assert isinstance(rule, SeparateLSTMRule)
    return rule


def test_kernels_are_served_by_one_and_the_rest_by_the_other() -> None:
    rule, sizes = make_rule(), [4, 3, 2, 5]
    params, grads = random_values((6, 14), 0).float(), random_values((6, 14), 1).float()
    with torch.no_grad():
        deltas, _ = run(rule, Segments(sizes, shapes=[(2, 2), (1, 1, 3), (2,), (5, 1, 1, 1)]), params, grads)
        alone = {part: run(part, Segments(sizes), params, grads)[0] for part in (rule.convolutions, rule.others)}
    by = (rule.others, rule.convolutions, rule.others, rule.convolutions)
    for index, (part, found) in enumerate(zip(by, deltas.split(sizes, dim=1), strict=True)):
        torch.testing.assert_close(found, alone[part].split(sizes, dim=1)[index])


def test_copies_lie_side_by_side() -> None:
    rule = make_rule()
    param, grad = random_values((10,), 0).float(), random_values((10,), 1).float()
    once, twice = Segments([3, 2], shapes=[(3, 1, 1), (2, 1)]), Segments([3, 2], copies=2, shapes=[(3, 1, 1), (2, 1)])
    with torch.no_grad():
        both, _ = rule.update(param, grad, rule.init_state(twice), twice)
        for half in (slice(0, 5), slice(5, 10)):
            delta, _ = rule.update(param[half], grad[half], rule.init_state(once), once)
            torch.testing.assert_close(both[half], delta)


def test_copies_may_have_weights_of_their_own() -> None:
    one, two = make_rule(), SeparateLSTMRule(SeparateLSTMConfig(hidden_size=3))
    param, grad = random_values((10,), 0).float(), random_values((10,), 1).float()
    single, both = Segments([3, 2], shapes=[(3, 1, 1), (2, 1)]), Segments([3, 2], copies=2, shapes=[(3, 1, 1), (2, 1)])
    with torch.no_grad():
        per_copy = PerCopy(one, torch.stack([flat_weights(one), flat_weights(two)]))
        deltas, _ = per_copy.update(param, grad, one.init_state(both), both)
        for rule, half in ((one, slice(0, 5)), (two, slice(5, 10))):
            delta, _ = rule.update(param[half], grad[half], rule.init_state(single), single)
            torch.testing.assert_close(deltas[half], delta)


def test_a_step_of_a_backend_knows_kernels_from_the_rest() -> None:
    """Of the whole rule, which an optimizer would have taken apart."""
    rule = make_rule().requires_grad_(False)
    shapes = [(2, 1, 3), (2, 3), (4,)]
    params, grads = ([random_values(shape, seed).float() for shape in shapes] for seed in (0, 1))
    segments = [Segments([param.numel()]) for param in params]
    states = [
        {name: value.unflatten(-1, shape) for name, value in rule.init_state(one).items()}
        for one, shape in zip(segments, shapes)
    ]
    tensors = Tensors([param.clone() for param in params], grads, states, torch.float32, "float32", [6, 6, 4])
    step(ReferenceBackend(), rule, tensors, StepOptions())
    by = (rule.convolutions, rule.others, rule.others)
    for part, before, after, grad, one in zip(by, params, tensors.params, grads, segments, strict=True):
        delta, _ = part.update(before.flatten(), grad.flatten(), part.init_state(one), one)
        torch.testing.assert_close(after, before + delta.view_as(before))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_an_optimizer_does_as_two_groups_of_their_own_would() -> None:
    rule, one, two = make_rule(), network(), network()
    kernels = [param for param in two.parameters() if param.dim() == 4]
    rest = [param for param in two.parameters() if param.dim() < 4]
    groups = [{"params": kernels, "rule": rule.convolutions}, {"params": rest, "rule": rule.others}]
    whole = LearnedOptimizer(one.parameters(), rule=rule)
    for mine, its in zip(train(whole, one), train(LearnedOptimizer(groups), two), strict=True):
        assert torch.equal(mine, its)
    # By the fast path of an LSTM alone, whatever that is here.
    assert whole.backend == LearnedOptimizer(network().parameters(), rule=LSTMRule()).backend


def test_an_optimizer_goes_on_from_saved_state() -> None:
    rule, one, two = make_rule(), network(), network()
    first, second = (LearnedOptimizer(model.parameters(), rule=rule) for model in (one, two))
    train(first, one)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    for mine, its in zip(train(first, one), train(second, two), strict=True):
        assert torch.equal(mine, its)


def test_its_settings_are_those_of_both() -> None:
    rule = SeparateLSTMRule(SeparateLSTMConfig(hidden_size=7, num_layers=1, output_scale=0.5))
    for part in (rule.convolutions, rule.others):
        assert (part.config.hidden_size, part.config.num_layers, part.config.output_scale) == (7, 1, 0.5)


def test_a_complex_matrix_is_no_kernel() -> None:
    """It is a pair of real ones, which has a dimension more."""
    rule = random_rule({"kind": "separate_lstm", "hidden_size": 3}, torch.float32)
    assert isinstance(rule, SeparateLSTMRule)
    moved = []
    for its in (rule, rule.others):
        param = torch.ones(2, 3, dtype=torch.complex64, requires_grad=True)
        param.grad = torch.full((2, 3), 0.5 - 1.0j)
        LearnedOptimizer([param], its, backend="reference").step()
        moved.append(param.detach())
    assert torch.equal(*moved)
