"""Everything in torch that works around an optimizer works around these."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from learnedopt import LearnedOptimizer
from learnedopt.rules.coordinates import AGE
from tests.optim.reference import (
    CASES,
    KINDS,
    LAYOUTS,
    Case,
    ReferenceLoop,
    TraceRule,
    draw_grads,
    draw_params,
    same_bits,
    snapshot,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Schedulers --------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.5), lr_scheduler.StepLR(o, 2)]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.1, anneal_epochs=3),
}


@each_case
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_set_the_lr_of_the_next_step(
    case: Case, as_tensor: bool, scheduler: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    g = generator()
    params = draw_params(g, ["vector"])
    reference = ReferenceLoop(case.rule(), params)
    optimizer = case.build(params, lr=torch.tensor(1.0) if as_tensor else 1.0)
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(4):
        draw_grads(g, params)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        reference.step([param.grad for param in params if param.grad is not None], 1.0, rates[-1])
        optimizer.step(loss=1.0)
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(1.0)
        else:
            schedule.step()
    assert len(set(rates)) > 1
    torch.testing.assert_close(params[0].detach(), reference.params[0])


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    known = {name for name in lr_scheduler.__all__ if issubclass(getattr(lr_scheduler, name), LRScheduler)}
    assert known - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.1, max_lr=1.0),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8),
    ],
    ids=["CyclicLR", "OneCycleLR"],
)
def test_schedulers_that_would_cycle_the_momentum_say_what_to_do(
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler],
) -> None:
    with pytest.raises(ValueError, match=r"momentum.*`cycle_momentum`"):
        scheduler(CASES["trace"].build(draw_params(generator(), ["vector"])))


# Gradients from elsewhere ------------------------------------------------------------------------------------------


@each_case
def test_a_skipped_step_of_gradient_scaling_moves_nothing(case: Case) -> None:
    (param,) = params = draw_params(generator(), ["vector"])
    optimizer = case.build(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = param.detach().clone()
    optimizer.observe(1.0)
    scaler.scale(param.sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before) and not optimizer.state
    optimizer.zero_grad()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(param.grad, torch.ones(7))
    assert not torch.equal(param, before)


@each_case
def test_accumulated_and_clipped_gradients_are_what_the_rule_sees(case: Case) -> None:
    params = draw_params(generator(), ["vector", "matrix"])
    parts = [[torch.randn(param.shape, generator=generator(seed)) for param in params] for seed in (1, 2)]
    sums = [left + right for left, right in zip(*parts)]
    norm = math.sqrt(sum(float(total.square().sum()) for total in sums))
    reference = ReferenceLoop(case.rule(), params)
    reference.step([total / norm for total in sums], 1.0)
    optimizer = case.build(params)
    for part in parts:
        sum((param * grad).sum() for param, grad in zip(params, part)).backward()  # type: ignore[union-attr]
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step(loss=1.0)
    for param, expected in zip(params, reference.params):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-4, atol=1e-5)


# Compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
def test_a_compiled_step_is_the_eager_one_to_the_last_bit(case: Case) -> None:
    """Nothing of it is compiled, so that it is as fast."""
    torch.compiler.reset()
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    results = []
    for compiled in (False, True):
        g = generator()
        optimizer = case.build(
            draw_params(g, ["vector", "5-d", "matrix"]), nonfinite="skip", state_dtype=torch.bfloat16
        )
        step = torch.compile(optimizer.step, backend=compiler) if compiled else optimizer.step
        for _ in range(3):
            draw_grads(g, optimizer.param_groups[0]["params"])
            step(loss=torch.tensor(1.0))
        results.append(snapshot(optimizer))
    assert same_bits(*results)
    assert not graphs


def test_a_step_in_one_graph_is_refused_in_a_sentence() -> None:
    torch.compiler.reset()
    optimizer = CASES["trace"].build(draw_params(generator(), ["vector"]))
    with pytest.raises(Exception, match="a step of learnedopt has kernels of its own, and is not compiled"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_what_a_closure_calls_stays_compiled() -> None:
    torch.compiler.reset()
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    net = nn.Linear(3, 2)
    compiled = torch.compile(net, backend=compiler)
    optimizer = CASES["trace"].build([*net.parameters()])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = compiled(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(graphs) == 1


# Parameters and state in other hands -------------------------------------------------------------------------------


@each_case
def test_parameters_and_state_can_be_swapped_in(case: Case) -> None:
    swap = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)
    if swap is None:
        pytest.skip("this torch has no swap_in_optimizer_params_and_state")
    g = generator()
    optimizer = case.build(draw_params(g, ["vector", "matrix"]))
    params = optimizer.param_groups[0]["params"]
    draw_grads(g, params)
    optimizer.step(loss=1.0)
    twin = case.build([param.detach().clone().requires_grad_() for param in params])
    twin.load_state_dict(optimizer.state_dict())
    twins = twin.param_groups[0]["params"]
    draw_grads(g, twins)
    others = {str(i): param.detach().clone().requires_grad_() for i, param in enumerate(twins)}
    for other, param in zip(others.values(), twins):
        other.grad = param.grad
    state = twin.state_dict()
    copies = {key: {name: value.clone() for name, value in entries.items()} for key, entries in state["state"].items()}

    before = snapshot(optimizer)
    with swap(optimizer, others, {**state, "state": copies}):
        optimizer.step(loss=1.0)
    twin.step(loss=1.0)
    assert same_bits(snapshot(optimizer), before)
    assert same_bits([param.detach() for param in others.values()], [param.detach() for param in twins])
    for key, entries in twin.state_dict()["state"].items():
        assert same_bits(list(copies[key].values()), list(entries.values()))


@each_case
@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.5)], ids=["mean", "EMA"])
def test_averages_of_the_weights_follow_the_steps(case: Case, average: Callable[..., None] | None) -> None:
    net = nn.Linear(3, 2)
    optimizer = case.optimizer(net.parameters(), case.rule())
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=average)
    history = []
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(3)).square().sum().backward()
        optimizer.step(loss=1.0)
        averaged.update_parameters(net)
        history.append(net.weight.detach().clone())
    assert not torch.equal(*history)
    torch.testing.assert_close(next(averaged.module.parameters()).detach(), (history[0] + history[1]) / 2)


@each_case
def test_a_model_that_moves_to_another_precision_takes_its_optimizer_along(case: Case) -> None:
    net = nn.Linear(3, 2)
    optimizer = case.optimizer(net.parameters(), case.rule())
    net.bfloat16()
    net(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(loss=1.0)
    kept = {name: entry.dtype for name, entry in optimizer.state[net.weight].items() if name != AGE}
    assert set(kept.values()) == {torch.float32}


# Hooks and profiling -----------------------------------------------------------------------------------------------


@each_case
def test_step_hooks_fire_once(case: Case) -> None:
    LearnedOptimizer(draw_params(generator(), ["vector"]), TraceRule())  # torch wraps step when a class is first used
    params = draw_params(generator(), ["vector"])
    draw_grads(generator(), params)
    calls: list[str] = []
    subclass = type("Mine", (case.optimizer,), {})
    for optimizer in (case.build(params), subclass(params, case.rule())):
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        optimizer.step(loss=1.0)
        assert calls == ["before", "after"]
        calls.clear()


@each_case
def test_the_profiler_shows_the_step_by_the_name_of_its_class(case: Case) -> None:
    params = draw_params(generator(), ["vector"])
    draw_grads(generator(), params)
    optimizer = case.build(params)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step(loss=1.0)
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    for method in ("step", "zero_grad"):
        assert names.count(f"Optimizer.{method}#{case.optimizer.__name__}.{method}") == 1


@each_case
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_cleared(case: Case, set_to_none: bool) -> None:
    params = draw_params(generator(), list(LAYOUTS))
    draw_grads(generator(), params)
    case.build(params).zero_grad(set_to_none=set_to_none)
    assert [param.grad is None for param in params] == [set_to_none] * len(params)
    assert not any(param.grad.any() for param in params if param.grad is not None)
