"""Every backend does what the reference does, on every rule, dtype, shape and way to keep state."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt import LearnedOptimizer
from learnedopt.kernels import BackendName, Case, choose, get_backend, read_state, refusal, state_layout
from learnedopt.kernels.core import blocks
from learnedopt.kernels.core.workspace import BLOCKS
from learnedopt.rules import (
    AdamLSTMConfig,
    AdamLSTMRule,
    ChainConfig,
    ChainRule,
    CoordinateLSTM,
    InEigenbasesConfig,
    LawsConfig,
    LawsRule,
    LSTMConfig,
    LSTMRule,
    MetaLSTMConfig,
    MetaLSTMRule,
    NormalizedGradientConfig,
    NormalizedGradientRule,
    RNNpropConfig,
    RNNpropRule,
    ScheduleFreeConfig,
    ScheduleFreeRule,
    TensorController,
    UpdateRule,
)
from tests.kernels.support import whole_codes
from tests.optim.reference import (
    DTYPES,
    LAYOUTS,
    TraceRule,
    draw_grads,
    draw_params,
    in_bases,
    same_bits,
    snapshot,
    trained,
)

CPU = torch.device("cpu")
RULES: dict[str, Callable[[], UpdateRule]] = {
    "lstm": lambda: trained(LSTMRule(), scale=0.2),
    "lstm, one layer, identity": lambda: trained(
        LSTMRule(LSTMConfig(hidden_size=3, num_layers=1, preprocessing="identity", output_scale=1.0))
    ),
    "lstm, three layers": lambda: trained(LSTMRule(LSTMConfig(hidden_size=5, num_layers=3, preprocessing_p=7.0))),
    "meta-lstm": lambda: trained(MetaLSTMRule(MetaLSTMConfig(hidden_size=6)), scale=0.2),
    "meta-lstm, as in the code": lambda: trained(
        MetaLSTMRule(MetaLSTMConfig(hidden_size=6, gate_feedback="preactivation", gradient_divisor=3.0)), scale=0.2
    ),
    "adam-lstm": lambda: trained(AdamLSTMRule(AdamLSTMConfig(hidden_size=8)), scale=0.2),
    "adam-lstm, one layer": lambda: trained(
        AdamLSTMRule(AdamLSTMConfig(hidden_size=4, num_layers=1, fast_decay=0.5, eps=0.1, max_time=20.0)), scale=0.2
    ),
    "schedule-free": lambda: trained(ScheduleFreeRule(ScheduleFreeConfig(CoordinateLSTM())), scale=0.2),
    "schedule-free, one layer": lambda: trained(
        ScheduleFreeRule(
            ScheduleFreeConfig(
                CoordinateLSTM(hidden_size=5, num_layers=1),
                momentum_decay=0.5,
                square_decay=0.9,
                eps=0.1,
                max_time=20.0,
            )
        ),
        scale=0.2,
    ),
    "schedule-free, no LSTM": lambda: trained(ScheduleFreeRule(ScheduleFreeConfig(interpolation=0.5)), scale=0.2),
    "schedule-free, controlled": lambda: trained(
        ScheduleFreeRule(ScheduleFreeConfig(TensorController(units=3))), scale=0.2
    ),
    "eigenbasis": lambda: trained(in_bases(settling=3, interval=4), scale=0.05),
    "eigenbasis, with an LSTM": lambda: trained(in_bases(layers=1), scale=0.05),
    "normalized": lambda: NormalizedGradientRule(),
    "normalized, floor": lambda: NormalizedGradientRule(
        NormalizedGradientConfig(square_decay=0.9, eps=0.1, relative_eps=0.3)
    ),
    "laws": lambda: trained(LawsRule(LawsConfig(settling_time=3.0)), scale=0.2),
    "chain": lambda: trained(chain(), scale=0.2),
    "chain in bases": lambda: trained(chain(settling=3, interval=4), scale=0.05),
    "chain in bases, cut": lambda: trained(chain(settling=3, interval=4, factor_interval=2, max_side=3), scale=0.05),
    "rnnprop": lambda: trained(RNNpropRule(), scale=0.2),
    "rnnprop, one layer": lambda: trained(
        RNNpropRule(RNNpropConfig(hidden_size=4, num_layers=1, momentum_decay=0.5, eps=0.1, output_scale=0.01)),
        scale=0.2,
    ),
}


def chain(**bases: Any) -> ChainRule:
    """The default's kind: with settings of bases, in them."""
    if not bases:
        return ChainRule(ChainConfig(then=LawsConfig(settling_time=5.0)))
    inner = NormalizedGradientConfig(square_decay=0.99, relative_eps=0.02)
    return ChainRule(ChainConfig(InEigenbasesConfig(inner, blocks=True, threshold=0.0, **bases)))


each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
each_backend = pytest.mark.parametrize("backend", ["blocked", "native"])

# Of parameters and state after 50 steps. Sums are taken in another order, which half precision may round the other
# way at every step.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 2e-5, torch.float64: 1e-11}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skip_unless_served(backend: BackendName, case: Case) -> None:
    chosen = get_backend(backend)
    if reason := refusal(chosen, case):
        pytest.skip(f"{backend}: {reason}")
    try:
        chosen.prepare()
    except RuntimeError as error:
        pytest.skip(f"{backend}: {error}")


def run(
    rule: UpdateRule, backend: BackendName, dtype: torch.dtype, steps: int, **options: Any
) -> tuple[LearnedOptimizer, list[Tensor]]:
    """A trajectory over every layout, and a tensor that is a few blocks of any backend; parameters and state."""
    g = generator()
    params = draw_params(g, list(LAYOUTS), dtype)
    params.append(torch.randn(7, 3, 40, generator=g).to(dtype).permute(1, 2, 0).requires_grad_())
    optimizer = LearnedOptimizer(params, rule, 0.7, 0.1, backend=backend, **options)
    for t in range(steps):
        draw_grads(g, params)
        optimizer.step(loss=1.0 / (t + 1))
    return optimizer, snapshot(optimizer)


@cache
def expected(name: str, dtype: torch.dtype, steps: int) -> list[Tensor]:
    return run(RULES[name](), "reference", dtype, steps)[1]


@each_backend
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fifty_steps_are_those_of_the_reference(name: str, backend: BackendName, dtype: torch.dtype) -> None:
    skip_unless_served(backend, Case(RULES[name](), CPU, torch.promote_types(dtype, torch.float32), "float32"))
    optimizer, actual = run(RULES[name](), backend, dtype, 50)
    assert optimizer.backend == backend
    for one, other in zip(actual, expected(name, dtype, 50), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@each_backend
@pytest.mark.parametrize("name", RULES)
def test_extreme_gradients_do_what_they_do_to_the_reference(name: str, backend: BackendName) -> None:
    skip_unless_served(backend, Case(RULES[name](), CPU, torch.float32, "float32"))
    extremes = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-42, 0.0]

    def taken(chosen: BackendName) -> list[Tensor]:
        g = generator()
        params = [torch.randn(5, generator=g).requires_grad_() for _ in extremes]
        optimizer = LearnedOptimizer(params, RULES[name](), maximize=True, backend=chosen)
        for step in range(3):
            draw_grads(g, params)
            for param, value in zip(params, extremes):
                if param.grad is not None and step < 2:
                    param.grad[2] = value
            optimizer.step(loss=1.0 / (step + 1))
        return snapshot(optimizer)

    for one, other in zip(taken(backend), taken("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@each_backend
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_do_not_depend_on_how_tensors_are_cut(
    name: str, backend: BackendName, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_served(backend, Case(RULES[name](), CPU, torch.float32, "float32"))
    whole = expected(name, dtype, 3)
    monkeypatch.setattr(blocks, "BLOCK", 50)
    for one, other in zip(run(RULES[name](), backend, dtype, 3)[1], whole, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@each_backend
@each_rule
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_step_from_low_precision_state_is_that_of_the_reference(
    rule: Callable[[], UpdateRule], backend: BackendName, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 50)  # parts of large tensors, and several small ones together
    name = str(state_dtype).removeprefix("torch.")
    skip_unless_served(backend, Case(rule(), CPU, torch.float32, name))  # type: ignore[arg-type]
    reference, _ = run(rule(), "reference", torch.float32, 10, state_dtype=state_dtype)
    other = LearnedOptimizer(
        [param.detach().clone().requires_grad_() for param in reference.param_groups[0]["params"]],
        rule(),
        backend=backend,
        state_dtype=state_dtype,
    )
    other.load_state_dict(reference.state_dict())
    assert (reference.backend, other.backend) == ("reference", backend)
    for optimizer in (reference, other):
        draw_grads(generator(1), optimizer.param_groups[0]["params"])
        optimizer.step(loss=0.5)
    layout = state_layout(rule(), torch.float32, name)  # type: ignore[arg-type]
    for one, two in zip(*(optimizer.param_groups[0]["params"] for optimizer in (other, reference)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        coordinates = rule().coordinates
        own = {} if coordinates is None else coordinates.initial(one.shape, None, None)
        assert other.state[one].keys() == {*layout, *own}
        for entry, spec in layout.items():
            left, right = other.state[one][entry], reference.state[two][entry]
            assert left.dtype == spec.dtype
            if spec.dtype == torch.uint8:
                continue  # a part of codes
            # Where rounding to full precision differs, so may what is kept: by one code, or one bit of bfloat16.
            if spec.dtype == torch.int8:
                left, right = whole_codes(other.state[one], entry), whole_codes(reference.state[two], entry)
            step = 1.0 if spec.dtype == torch.int8 else 1e-5 + 2**-7 * right.abs()
            assert bool(((left - right).abs() <= step).all())
            if spec.dtype != torch.float32:
                assert int((left != right).sum()) <= 0.01 * left.numel() + 1


@each_backend
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_bad_gradient_spoils_its_own_coordinate_alone(backend: BackendName, state_dtype: torch.dtype) -> None:
    rule = LSTMRule(LSTMConfig(hidden_size=5))
    name = str(state_dtype).removeprefix("torch.")
    skip_unless_served(backend, Case(rule, CPU, torch.float32, name))  # type: ignore[arg-type]
    params = [torch.ones(7, requires_grad=True), torch.ones(60, requires_grad=True)]
    optimizer = LearnedOptimizer(params, rule, backend=backend, state_dtype=state_dtype)
    for bad in (1.0, torch.nan, 1.0):
        for param in params:
            param.grad = torch.ones_like(param)
            param.grad[3] = bad
        optimizer.step()
    for param in params:
        memory = read_state(optimizer.state[param], rule.state_spec(), torch.float32)
        spoiled = torch.cat([values.isnan().flatten(0, 1) for values in memory.values()])
        assert torch.equal(spoiled, torch.arange(param.numel()).eq(3).expand_as(spoiled))


@pytest.mark.parametrize(
    "name", ["lstm", "meta-lstm", "adam-lstm", "schedule-free", "schedule-free, no LSTM", "rnnprop"]
)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_blocked_step_allocates_nothing_that_grows_with_the_model(
    name: str, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2048 // BLOCKS)
    shapes = ((20, 300), (3000,), (400,), (9,))
    params = [torch.randn(shape, generator=generator()).requires_grad_() for shape in shapes]
    params.append(torch.randn(20, 300, generator=generator()).t().requires_grad_())
    draw_grads(generator(1), params)
    optimizer = LearnedOptimizer(params, RULES[name](), 0.7, 0.1, backend="blocked", state_dtype=state_dtype)
    optimizer.step(loss=1.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step(loss=1.0)
    # Less than one number for each coordinate of a block.
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * 2048


# The choice --------------------------------------------------------------------------------------------------------


def test_auto_takes_what_serves_and_says_why_not_the_others() -> None:
    backend, reasons = choose(Case(TraceRule(), CPU, torch.float32, "float32"))
    assert backend.name == "reference"
    assert list(reasons) == ["triton", "native", "blocked"]
    assert "TraceRule" in reasons["blocked"] and "cpu" in reasons["triton"]
    backend, reasons = choose(Case(LSTMRule().double(), CPU, torch.float64, "float32"))
    assert backend.name == "blocked" and "float64" in reasons["native"]


class Subclass(LSTMRule):
    """Might compute anything."""


@pytest.mark.parametrize(
    ("backend", "params", "rule", "message"),
    [
        ("triton", torch.ones(2), LSTMRule(), "'triton' was asked for and cannot serve: it runs on CUDA"),
        ("native", torch.ones(2, dtype=torch.float64), LSTMRule(), "'native' .* computes in float32, .*float64"),
        ("blocked", torch.ones(2), TraceRule(), "'blocked' .* this is TraceRule"),
        ("blocked", torch.ones(2), Subclass(), "'blocked' .* this is Subclass"),
        ("fast", torch.ones(2), LSTMRule(), "backend must be one of .*'auto'.*'reference'.*, got 'fast'"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_at_construction(
    backend: Any, params: Tensor, rule: UpdateRule, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([params], rule, backend=backend)


def test_a_group_that_the_backend_cannot_serve_is_refused() -> None:
    optimizer = LearnedOptimizer([torch.ones(2)], LSTMRule(), backend="blocked")
    with pytest.raises(ValueError, match="'blocked' was asked for"):
        optimizer.add_param_group({"params": [torch.ones(2)], "rule": TraceRule()})


def test_the_choice_is_visible_for_each_group_where_it_differs() -> None:
    optimizer = LearnedOptimizer([torch.ones(2, dtype=torch.float64)], LSTMRule())
    assert optimizer.backend == "blocked"
    optimizer.add_param_group({"params": [torch.ones(2)], "rule": TraceRule()})
    assert optimizer.backend == "blocked on cpu, reference on cpu"


def test_loading_leaves_the_backend_that_was_asked_for() -> None:
    for backend in ("blocked", "reference"):
        optimizer = run(RULES["lstm"](), backend, torch.float32, 1)[0]
        optimizer.load_state_dict(run(RULES["lstm"](), "reference", torch.float32, 1)[0].state_dict())
        assert optimizer.backend == backend


def test_parameters_that_are_nowhere_yet_are_asked_about_later() -> None:
    optimizer = LearnedOptimizer([torch.ones(2, device="meta", requires_grad=True)], LSTMRule(), backend="blocked")
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match=r"'blocked' .* on meta"):
        optimizer.step()


def test_steps_are_the_same_bits_every_time() -> None:
    for backend in ("blocked", "reference"):
        first, second = (run(RULES["adam-lstm"](), backend, torch.float32, 3)[1] for _ in range(2))
        assert same_bits(first, second)
