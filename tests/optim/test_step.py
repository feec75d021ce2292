"""What one step computes, on every kind of parameter, and what it must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.kernels.bases import step as bases_step
from learnedopt.kernels.core import blocks
from learnedopt.rules import LSTMConfig, LSTMRule, Segments
from tests.optim.reference import (
    CASES,
    DTYPES,
    LAYOUTS,
    Case,
    ReferenceLoop,
    TraceRule,
    devices_of_state,
    draw_grads,
    draw_params,
    same_bits,
    snapshot,
    trained,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SEEDS = st.integers(0, 2**32 - 1)

# A step in half precision may round the other way where the two computations differ in the last bit of float32.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_the_reference_loop(case: Case, dtype: torch.dtype, layout: str) -> None:
    g = generator()
    params = draw_params(g, [layout, "vector"], dtype)
    strides = [param.stride() for param in params]
    reference = ReferenceLoop(case.rule(), params)
    optimizer = case.build(params, lr=0.7, weight_decay=0.1)
    for t in range(4):
        draw_grads(g, params)
        reference.step([param.grad for param in params if param.grad is not None], 1.0 / (t + 1), 0.7, 0.1)
        optimizer.step(loss=1.0 / (t + 1))
    for param, expected in zip(params, reference.params):
        torch.testing.assert_close(param.detach(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert [param.stride() for param in params] == strides


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [1, 7, 16])
def test_results_do_not_depend_on_the_size_of_blocks(
    case: Case, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(case, list(LAYOUTS), dtype)
    monkeypatch.setattr(blocks, "BLOCK", block)
    cut = run(case, list(LAYOUTS), dtype)
    assert len(whole) == len(cut)
    for expected, actual in zip(whole, cut):
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def run(case: Case, layouts: list[str], dtype: torch.dtype = torch.float32, steps: int = 3) -> list[Tensor]:
    """All parameters and state after a few steps."""
    g = generator()
    params = draw_params(g, layouts, dtype)
    optimizer = case.build(params)
    for _ in range(steps):
        draw_grads(g, params)
        optimizer.step(loss=2.0)
    return snapshot(optimizer)


def test_state_of_a_tensor_advances_once_per_step_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    params = draw_params(generator(), ["vector", "0-d", "matrix"])
    optimizer = CASES["trace"].build(params)
    for _ in range(3):
        draw_grads(generator(), params)
        optimizer.step()
    assert [optimizer.state[param]["steps"].item() for param in params] == [3, 3, 3]


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_has_the_shape_of_the_parameter_and_at_least_float32(case: Case, dtype: torch.dtype) -> None:
    (param,) = params = draw_params(generator(), ["channels-last"], dtype)
    draw_grads(generator(), params)
    optimizer = case.build(params)
    assert not optimizer.state
    optimizer.step(loss=1.0)
    for name, spec in case.rule().state_spec().items():
        entry = optimizer.state[param][name]
        assert entry.shape == spec.shape + (param.shape if spec.scope == "coordinate" else ())
        assert entry.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_double_precision_rule_computes_in_double_precision() -> None:
    rule = trained(LSTMRule(LSTMConfig(hidden_size=4))).double()
    (param,) = params = draw_params(generator(), ["vector"])
    draw_grads(generator(), params)
    assert param.grad is not None
    delta, _ = rule.update(
        param.double(), param.grad.double(), rule.init_state(Segments([7]), torch.float64), Segments([7])
    )
    expected = (param.double() + delta).float()
    optimizer = LearnedOptimizer(params, rule)
    optimizer.step()
    assert optimizer.state[param]["h"].dtype == torch.float64
    assert torch.equal(param, expected)


@each_case
def test_a_complex_parameter_is_a_pair_of_reals(case: Case) -> None:
    # Of the same kind to a rule that sees how many dimensions a tensor has: both count as kernels of convolutions.
    value, grad = torch.randn(2, 3, 1, 2, generator=generator()), torch.randn(2, 3, 1, 2, generator=generator(1))
    real = value.clone().requires_grad_()
    complex_ = torch.view_as_complex(value.clone()).requires_grad_()
    real.grad = grad
    complex_.grad = torch.view_as_complex(grad * torch.tensor([1.0, -1.0])).conj()
    for param in (real, complex_):
        case.build([param]).step(loss=1.0)
    torch.testing.assert_close(torch.view_as_real(complex_.detach()), real.detach())


@each_case
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_never_written(case: Case, maximize: bool) -> None:
    params = draw_params(generator(), list(LAYOUTS))
    draw_grads(generator(), params)
    before = [param.grad.clone() for param in params if param.grad is not None]
    case.build(params, maximize=maximize).step(loss=1.0)
    assert same_bits([param.grad for param in params if param.grad is not None], before)


@each_case
def test_maximize_negates_the_gradient(case: Case) -> None:
    results = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        params = draw_params(generator(), ["matrix"])
        params[0].grad = sign * torch.ones(5, 3)
        optimizer = case.build(params, maximize=maximize)
        optimizer.step(loss=1.0)
        results.append(snapshot(optimizer))
    assert same_bits(*results)


def test_an_expanded_gradient_is_read() -> None:
    params = draw_params(generator(), ["matrix"])
    params[0].sum().backward()
    grad = params[0].grad
    assert grad is not None
    expected = ReferenceLoop(TraceRule(), params)
    expected.step([grad.clone()], 1.0)
    params[0].grad = torch.ones(()).expand(5, 3)
    CASES["trace"].build(params).step()
    torch.testing.assert_close(params[0].detach(), expected.params[0])


@each_case
def test_a_parameter_without_gradient_is_skipped(case: Case) -> None:
    g = generator()
    present, sometimes = params = draw_params(g, ["vector", "matrix"])
    optimizer = case.build(params)
    draw_grads(g, [present])
    before = sometimes.detach().clone()
    optimizer.step(loss=1.0)
    assert torch.equal(sometimes, before) and sometimes not in optimizer.state
    draw_grads(g, params)
    optimizer.step(loss=1.0)
    assert not torch.equal(sometimes, before)

    alone = before.clone().requires_grad_()
    alone.grad = sometimes.grad
    case.build([alone, present.detach().requires_grad_()]).step(loss=1.0)
    torch.testing.assert_close(sometimes, alone)


@pytest.mark.parametrize("block", [4, 16])
def test_a_parameter_listed_twice_is_updated_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    results = []
    for times in (1, 2):
        params = draw_params(generator(), ["vector"])
        draw_grads(generator(1), params)
        if times == 2:
            with pytest.warns(UserWarning, match="duplicate parameters"):
                optimizer = CASES["trace"].build(params * 2)
        else:
            optimizer = CASES["trace"].build(params)
        optimizer.step()
        results.append(params[0])
    assert torch.equal(*results)


@each_case
def test_sparse_gradients_are_refused_before_anything_changes(case: Case) -> None:
    params = draw_params(generator(), ["vector", "matrix"])
    draw_grads(generator(), params)
    params[1].grad = torch.eye(5, 3).to_sparse()
    optimizer = case.build(params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{case.optimizer.__name__} does not support sparse gradients"):
        optimizer.step(loss=1.0)
    assert same_bits(snapshot(optimizer), before)


@each_case
def test_expanded_parameters_are_refused_before_anything_changes(case: Case) -> None:
    params = [*draw_params(generator(), ["vector"]), nn.Parameter(torch.ones(1).expand(3))]
    draw_grads(generator(), params)
    optimizer = case.build(params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"cannot update an expanded parameter, here of shape \(3,\).*clone\(\)"):
        optimizer.step(loss=1.0)
    assert same_bits(snapshot(optimizer), before)
    params[1].grad = None
    optimizer.step(loss=1.0)


def test_a_conjugate_view_is_refused_because_it_could_not_be_written() -> None:
    param = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64).conj())
    param.grad = torch.ones(3, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"cannot update a conjugate view, here of shape \(3, 2\).*resolve_conj"):
        LearnedOptimizer([param]).step()


def test_all_that_is_trained_is_counted_however_it_is_grouped() -> None:
    """The default sees the number of tensors: of all groups, not of those that are empty or frozen."""
    case, results = CASES["schedule-free"], []
    for grouped in (False, True):
        first, second = params = draw_params(generator(), ["vector", "matrix"])
        others = [torch.zeros(0, requires_grad=True), torch.zeros(2)] if grouped else []
        groups = [{"params": [first, *others]}, {"params": [second]}] if grouped else params
        optimizer = case.build(groups)  # type: ignore[arg-type]
        for seed in (1, 2):
            draw_grads(generator(seed), params)
            optimizer.step()
        results.append([param.detach() for param in params])
    assert same_bits(*results)


@each_case
@pytest.mark.parametrize(
    ("before", "after"), [((10,), (1000,)), ((40, 8), (20, 8)), ((20, 16), (40, 8)), ((4, 4), (4,))]
)
def test_a_parameter_that_has_changed_its_shape_is_refused_before_anything_changes(
    case: Case, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    """Through ``.data``, as densification and resized vocabularies do; kernels would write beyond the state."""
    first, param = torch.ones(3, requires_grad=True), torch.ones(before, requires_grad=True)
    optimizer = case.build([first, param])
    first.grad, param.grad = torch.ones(3), torch.ones(before)
    optimizer.step(loss=0.5)
    param.data, param.grad = torch.ones(after), None
    param.grad = torch.ones(after)
    kept = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="a state does not have the shape of its parameter: parameter 1 has shape"):
        optimizer.step(loss=0.5)
    assert same_bits(snapshot(optimizer), kept)


@each_case
def test_tied_weights_are_one_parameter(case: Case) -> None:
    first, second = (nn.Linear(4, 4, bias=False) for _ in range(2))
    second.weight = first.weight
    net = nn.Sequential(first, second)
    net(torch.randn(2, 4, generator=generator())).square().sum().backward()
    alone = first.weight.detach().clone().requires_grad_()
    alone.grad = first.weight.grad
    case.optimizer(net.parameters(), case.rule()).step(loss=1.0)
    case.build([alone]).step(loss=1.0)
    assert torch.equal(second.weight, alone)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_into_the_step(case: Case, dtype: torch.dtype) -> None:
    results = []
    for enabled in (False, True):
        params = draw_params(generator(), ["vector", "matrix"])
        draw_grads(generator(), params)
        optimizer = case.build(params)
        with torch.autocast("cpu", dtype, enabled=enabled):
            optimizer.step(loss=1.0)
        results.append(snapshot(optimizer))
    assert same_bits(*results)


# Learning rate and weight decay ------------------------------------------------------------------------------------


@each_case
def test_lr_scales_the_update_and_decay_multiplies_the_old_parameters(case: Case) -> None:
    def after_one_step(**options: float) -> Tensor:
        params = draw_params(generator(), ["matrix"])
        draw_grads(generator(1), params)
        case.build(params, **options).step(loss=1.0)
        return params[0].detach()

    (start,) = draw_params(generator(), ["matrix"])
    delta = after_one_step() - start
    torch.testing.assert_close(after_one_step(lr=0.25), start + 0.25 * delta)
    torch.testing.assert_close(after_one_step(lr=0.25, weight_decay=0.4), start * 0.9 + 0.25 * delta)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_is_a_number(case: Case, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    results = []
    for lr in (0.5, torch.full(shape, 0.5)):
        params = draw_params(generator(), list(LAYOUTS), dtype)
        draw_grads(generator(1), params)
        case.build(params, lr=lr, weight_decay=0.25).step(loss=1.0)
        results.append([param.detach() for param in params])
    assert same_bits(*results)


@each_case
@pytest.mark.parametrize("as_tensor", [False, True])
@settings(max_examples=10)
@given(seed=SEEDS, dtype=st.sampled_from(DTYPES), scale=st.sampled_from([0.0, 1.0, 1e30, math.inf, math.nan]))
def test_lr_zero_changes_no_bit(case: Case, as_tensor: bool, seed: int, dtype: torch.dtype, scale: float) -> None:
    g = generator(seed)
    params = draw_params(g, list(LAYOUTS), dtype)
    with torch.no_grad():
        params[0][:2] = torch.tensor([-0.0, 0.0])
    before = [param.detach().clone() for param in params]
    optimizer = case.build(params, lr=torch.tensor(0.0) if as_tensor else 0.0, weight_decay=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=g).mul(scale).to(dtype)
        optimizer.step(loss=1.0)
    assert same_bits([param.detach() for param in params], before)


@each_case
def test_zero_gradients_leave_parameters_alone_where_the_rule_says_so(case: Case) -> None:
    params = draw_params(generator(), list(LAYOUTS))
    before = [param.detach().clone() for param in params]
    optimizer = case.build(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step(loss=1.0)
    unmoved = all(torch.equal(param, value) for param, value in zip(params, before))
    assert unmoved == case.rule().zero_gradient_is_noop


# Invariants --------------------------------------------------------------------------------------------------------


def trajectory(case: Case, values: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    params = [value.clone().requires_grad_() for value in values]
    optimizer = case.build(params)
    for step in grads:
        for param, grad in zip(params, step):
            param.grad = grad
        optimizer.step(loss=1.5)
    return [param.detach() for param in params]


def draw_problem(seed: int, sizes: list[int], steps: int = 3) -> tuple[list[Tensor], list[list[Tensor]]]:
    g = generator(seed)
    draws = [[torch.randn(size, generator=g) for size in sizes] for _ in range(steps + 1)]
    return draws[0], draws[1:]


@each_case
@settings(max_examples=10)
@given(seed=SEEDS, size=st.integers(1, 40))
def test_permuting_coordinates_permutes_the_result(case: Case, seed: int, size: int) -> None:
    values, grads = draw_problem(seed, [size])
    order = torch.randperm(size, generator=generator(seed))
    (plain,) = trajectory(case, values, grads)
    (permuted,) = trajectory(case, [values[0][order]], [[step[0][order]] for step in grads])
    torch.testing.assert_close(permuted, plain[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm", "meta-lstm"])
@settings(max_examples=10)
@given(seed=SEEDS, size=st.integers(0, 40), data=st.data())
def test_splitting_a_parameter_changes_nothing(name: str, seed: int, size: int, data: st.DataObject) -> None:
    # Only for rules without statistics of whole tensors; to the others, what a tensor is matters.
    values, grads = draw_problem(seed, [size])
    cut = data.draw(st.integers(0, size))
    (whole,) = trajectory(CASES[name], values, grads)
    halves = trajectory(
        CASES[name], [values[0][:cut], values[0][cut:]], [[step[0][:cut], step[0][cut:]] for step in grads]
    )
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-4, atol=1e-5)


@each_case
@settings(max_examples=10)
@given(seed=SEEDS, sizes=st.lists(st.integers(0, 12), min_size=2, max_size=5))
def test_the_order_of_parameters_does_not_matter(case: Case, seed: int, sizes: list[int]) -> None:
    values, grads = draw_problem(seed, sizes)
    forwards = trajectory(case, values, grads)
    backwards = trajectory(case, values[::-1], [step[::-1] for step in grads])
    for left, right in zip(forwards, backwards[::-1]):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


# Closures and losses -----------------------------------------------------------------------------------------------


@each_case
def test_a_closure_runs_once_with_gradients_and_its_value_is_returned(case: Case) -> None:
    (param,) = params = draw_params(generator(), ["vector"])
    optimizer = case.build(params)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(param.square().sum())
        losses[-1].backward()
        return losses[-1]

    before = param.detach().clone()
    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert not torch.equal(param, before)


@each_case
def test_an_exception_in_the_closure_changes_nothing(case: Case) -> None:
    g = generator()
    params = draw_params(g, ["vector", "matrix"])
    optimizer = case.build(params)
    draw_grads(g, params)
    optimizer.step(loss=1.0)
    before = snapshot(optimizer)
    optimizer.observe(1.0)

    def closure() -> float:
        draw_grads(g, params)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert same_bits(snapshot(optimizer), before)
    optimizer.step()  # the observed loss is still there


def observe_then(step: Callable[[LearnedOptimizer], object], loss: Tensor | float, optimizer: LearnedOptimizer) -> None:
    optimizer.observe(loss)
    step(optimizer)


WAYS: dict[str, Callable[[LearnedOptimizer, Tensor], object]] = {
    "closure": lambda optimizer, loss: optimizer.step(lambda: loss),
    "closure, as a number": lambda optimizer, loss: optimizer.step(loss.item),
    "keyword": lambda optimizer, loss: optimizer.step(loss=loss),
    "observe": lambda optimizer, loss: observe_then(lambda o: o.step(), loss, optimizer),
    "the keyword before the closure": lambda optimizer, loss: optimizer.step(lambda: 99.0, loss=loss),
    "the closure before observe": lambda optimizer, loss: observe_then(lambda o: o.step(lambda: loss), 99.0, optimizer),
    "observe, under a closure without value": lambda optimizer, loss: observe_then(
        lambda o: o.step(lambda: None), loss, optimizer
    ),
}


@each_case
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_loss_arrives_by_every_way(case: Case, way: Callable[[LearnedOptimizer, Tensor], object]) -> None:
    params = draw_params(generator(), ["vector"])
    draw_grads(generator(1), params)
    reference = ReferenceLoop(case.rule(), params)
    reference.step([param.grad for param in params if param.grad is not None], 0.125)
    way(case.build(params), torch.tensor([0.125], requires_grad=True))
    torch.testing.assert_close(params[0].detach(), reference.params[0])


@each_case
def test_a_missing_loss_is_an_error_only_where_the_rule_reads_it(case: Case) -> None:
    params = draw_params(generator(), ["vector"])
    draw_grads(generator(), params)
    optimizer = case.build(params)
    optimizer.observe(1.0)
    optimizer.step()
    before = snapshot(optimizer)
    if not case.rule().needs_loss:
        optimizer.step()
        assert not same_bits(snapshot(optimizer), before)
        return
    with pytest.raises(RuntimeError, match=r"step\(closure\).*step\(loss=loss\).*observe\(loss\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"one element, got shape \(2,\)"):
        optimizer.step(loss=torch.ones(2))
    assert same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_at_lr_zero_a_missing_loss_only_prepares_the_state(as_tensor: bool) -> None:
    params = draw_params(generator(), ["vector"])
    draw_grads(generator(), params)
    optimizer = CASES["meta-lstm"].build(params, lr=torch.tensor(0.0) if as_tensor else 0.0)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]].keys() == CASES["meta-lstm"].rule().state_spec().keys()
    assert not any(entry.any() for entry in optimizer.state[params[0]].values())


@each_case
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_nothing_waits_for_the_device(case: Case, nonfinite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors have no values: whatever reads one back to the host raises.
    monkeypatch.setattr(blocks, "BLOCK", 16)
    # What has bases asks, until a tensor has had its first gradient.
    monkeypatch.setattr(bases_step, "_begins", lambda grad, skip: True)
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((), (3, 4), (5, 7), (0,))]
    lr = torch.ones((), device="meta")
    optimizer = case.build(params, nonfinite=nonfinite)
    optimizer.param_groups[0]["lr"] = lr
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step(loss=torch.empty((), device="meta"))
    assert devices_of_state(optimizer, params) == {"meta"}
