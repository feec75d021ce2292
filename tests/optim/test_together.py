"""How many tensors are trained together: counted, or told; and the average that a rule keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.optim import options
from learnedopt.rules import ChainRule, LawsConfig, UpdateRule
from learnedopt.zoo import load_rule
from tests.optim.reference import CASES, KINDS, Case, chain, draw_grads, draw_params, same_bits, snapshot, trained

each_case = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
THAT_COUNT = [*("schedule-free", "eigenbasis", "chain"), "default", "light"]


@pytest.fixture(autouse=True)
def no_other_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning counts those that are alive."""
    monkeypatch.setattr(options, "_SINGLE", type(options._SINGLE)())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rule_of(name: str) -> Any:
    return KINDS[name].rule() if name in KINDS else name


def network(seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator(seed)) / 2)
    return net


def loss_of(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 5, generator=generator(step), dtype=torch.float64)
    return (net(x) - x[:, :2].square()).square().mean()


def close(left: nn.Module, right: nn.Module) -> bool:
    # Matrices that are stacked with others elsewhere are rounded in another way.
    return all(torch.allclose(*pair, rtol=1e-7, atol=1e-7) for pair in zip(left.parameters(), right.parameters()))


# Told ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "4", torch.tensor(4)])
def test_numbers_that_are_none_are_refused(bad: Any) -> None:
    params, rule = [torch.ones(2, requires_grad=True)], CASES["lstm"].rule()
    with pytest.raises(ValueError, match="together must be None or a number of tensors, at least 1, got"):
        LearnedOptimizer(params, rule, together=bad)
    with pytest.raises(ValueError, match="together must be None or a number of tensors"):
        LearnedOptimizer([{"params": params, "together": bad}], rule)
    optimizer = LearnedOptimizer(params, rule)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["together"] = bad
    with pytest.raises(ValueError, match="parameter group 0 of the state to load: together must be"):
        optimizer.load_state_dict(saved)


@each_case
def test_the_number_that_is_counted_changes_no_bit_when_it_is_told(case: Case) -> None:
    results = []
    for together in (None, 3):
        params = draw_params(generator(), ["vector", "matrix", "empty", "5-d"])  # of which one is empty
        optimizer = case.build(params, together=together)
        for seed in range(3):
            draw_grads(generator(seed), params)
            optimizer.step(loss=1.0)
        results.append(snapshot(optimizer))
    assert same_bits(*results)


@pytest.mark.parametrize("name", THAT_COUNT)
def test_optimizers_in_hooks_of_backward_are_one_optimizer(name: str) -> None:
    rule, nets = rule_of(name), [network(), network()]
    one = LearnedOptimizer(nets[0].parameters(), rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = {param: LearnedOptimizer([param], rule, together=4) for param in nets[1].parameters()}

    def step(param: Tensor) -> None:
        many[param].step()  # type: ignore[index]
        many[param].zero_grad()  # type: ignore[index]

    for param in many:
        param.register_post_accumulate_grad_hook(step)
    for number in range(30):
        one.zero_grad()
        for net in nets:
            loss_of(net, number).backward()
        one.step()
    assert close(*nets)


def test_optimizers_of_one_tensor_each_warn_once_where_they_are_not_told() -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(6)]
    with pytest.warns(UserWarning, match=r"3 learned optimizers of one tensor each.*together=number") as found:
        kept = [LearnedOptimizer([param], "light") for param in params]
    assert len(found) == 1
    del kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = [LearnedOptimizer([param], CASES["adam-lstm"].rule()) for param in params]  # which does not count
    assert len(kept) == len(params)


def test_optimizers_that_differ_from_one_are_those_that_are_not_told() -> None:
    """Which is what the warning is for."""
    nets = [network(), network()]
    one = LearnedOptimizer(nets[0].parameters(), "light")
    with pytest.warns(UserWarning, match="together"):
        many = [LearnedOptimizer([param], "light") for param in nets[1].parameters()]
    for net in nets:
        loss_of(net, 0).backward()
    for optimizer in (one, *many):
        optimizer.step()
    assert not close(*nets)


@pytest.mark.parametrize("name", THAT_COUNT)
def test_independent_networks_in_groups_are_as_each_alone(name: str) -> None:
    rule = rule_of(name)
    alone, others = ([network(seed) for seed in range(3)] for _ in range(2))
    optimizers = [LearnedOptimizer(net.parameters(), rule) for net in alone]
    optimizers.append(LearnedOptimizer([{"params": net.parameters(), "together": 4} for net in others], rule))
    for number in range(30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for net in (*alone, *others):
            loss_of(net, number).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(close(*pair) for pair in zip(alone, others))


@pytest.mark.parametrize("name", THAT_COUNT)
def test_a_complex_parameter_is_one_tensor_of_pairs(name: str) -> None:
    """Not two tensors: to what is counted, and to what is asked about whole tensors."""
    rule = rule_of(name)
    value, grad = (torch.randn(6, 2, generator=generator(seed)) for seed in (0, 1))
    beside = torch.ones(3)

    def moved(*params: Tensor, grads: tuple[Tensor, ...]) -> list[Tensor]:
        params = *(param.clone().requires_grad_() for param in params), beside.clone().requires_grad_()
        for param, its in zip(params, (*grads, beside), strict=True):
            param.grad = its
        LearnedOptimizer(params, rule).step()
        return [param.detach() for param in params]

    pairs, rest = moved(value, grads=(grad,))
    complex_, same = moved(torch.view_as_complex(value), grads=(torch.view_as_complex(grad),))
    torch.testing.assert_close(torch.view_as_real(complex_), pairs)
    torch.testing.assert_close(same, rest)
    *_, other = moved(value[:, 0], value[:, 1], grads=(grad[:, 0], grad[:, 1]))
    assert not torch.allclose(other, rest, rtol=1e-4, atol=0)


# The average --------------------------------------------------------------------------------------------------------

AVERAGING: dict[str, Callable[[], Any]] = {
    "in bases": lambda: trained(chain(), scale=0.1),
    "not in bases": lambda: trained(ChainRule(), scale=0.1),
    "default": lambda: load_rule("default"),
    "light": lambda: load_rule("light"),
}
each_form = pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING.keys())
WITHOUT = [name for name in KINDS if name != "chain"]


def trained_for(steps: int, rule: Any, params: list[Tensor]) -> LearnedOptimizer:
    optimizer = LearnedOptimizer(params, rule)
    for seed in range(steps):
        draw_grads(generator(seed), params)
        optimizer.step(loss=1.0)
    return optimizer


def averages(optimizer: LearnedOptimizer, rule: UpdateRule) -> Iterator[Tensor]:
    """From the definition: of θ = x + η_t (z - x) and the offset z - x."""
    config = rule.config
    assert isinstance(config, LawsConfig)
    for param in optimizer.param_groups[0]["params"]:
        state = optimizer.state[param]
        place = (1 - config.interpolation) * min(
            1.0, config.settling_time / float(state["step"])
        ) ** config.settling_power
        yield param.detach().double() - place * state["offset"].double()


@each_form
def test_within_the_context_parameters_are_the_average(make: Callable[[], ChainRule]) -> None:
    rule = make()
    params = draw_params(generator(), ["vector", "matrix", "transposed", "strided", "0-d", "channels-last"])
    optimizer = trained_for(5, rule, params)
    before, expected = snapshot(optimizer), list(averages(optimizer, rule.then))
    with optimizer.averaged_parameters():
        for param, value, old in zip(params, expected, before):
            torch.testing.assert_close(param.detach().double(), value, rtol=1e-6, atol=1e-6)
            assert not torch.equal(param.detach(), old)
    assert same_bits(snapshot(optimizer), before)


@each_form
def test_the_average_has_the_lower_loss(make: Callable[[], ChainRule]) -> None:
    """In a noisy bowl, where iterates keep moving."""
    net, noise = nn.Linear(6, 4, bias=False), generator(1)
    optimizer = LearnedOptimizer(net.parameters(), make())
    for _ in range(200):
        optimizer.zero_grad()
        (net.weight - 0.3 * torch.randn(4, 6, generator=noise)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        now = float(net.weight.square().sum())
        with optimizer.averaged_parameters():
            average = float(net.weight.square().sum())
    assert average < 0.98 * now


def test_parameters_come_back_bit_for_bit_after_an_exception() -> None:
    params = draw_params(generator(), ["vector", "matrix"], torch.bfloat16)
    optimizer = trained_for(3, KINDS["chain"].rule(), params)
    before = snapshot(optimizer)

    def evaluate() -> None:
        with optimizer.averaged_parameters(), torch.no_grad():
            assert not same_bits(snapshot(optimizer), before)
            params[0].fill_(torch.nan)
            raise KeyError("evaluation")

    with pytest.raises(KeyError, match="evaluation"):
        evaluate()
    assert same_bits(snapshot(optimizer), before)
    draw_grads(generator(9), params)
    optimizer.step()


def test_a_step_within_the_context_is_refused_and_changes_nothing() -> None:
    params = draw_params(generator(), ["vector", "matrix"])
    optimizer = trained_for(3, KINDS["chain"].rule(), params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) within averaged_parameters\(\)"), optimizer.averaged_parameters():
        optimizer.step()
    assert same_bits(snapshot(optimizer), before)
    optimizer.step()
    assert not same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("name", WITHOUT)
def test_of_rules_without_an_average_and_before_the_first_step_parameters_are_it(name: str) -> None:
    params = draw_params(generator(), ["vector", "matrix", "0-d"])
    for steps, rule in ((3, KINDS[name].rule()), (0, KINDS["chain"].rule())):
        optimizer = trained_for(steps, rule, params)
        before = snapshot(optimizer)
        with optimizer.averaged_parameters():
            assert same_bits(snapshot(optimizer), before)


def test_the_average_of_a_complex_parameter_is_that_of_its_pairs() -> None:
    rule, results = KINDS["chain"].rule(), []
    for view in (torch.view_as_complex, Tensor.contiguous):
        param = view(torch.randn(6, 2, generator=generator())).requires_grad_()
        param.grad = view(torch.randn(6, 2, generator=generator(1)))
        optimizer = LearnedOptimizer([param], rule)
        optimizer.step()
        with optimizer.averaged_parameters():
            results.append(param.detach().clone())
    torch.testing.assert_close(torch.view_as_real(results[0]), results[1])
