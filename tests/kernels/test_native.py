"""The compiled step is the rule's step: parameters and state, for every rule, dtype and layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from learnedopt.kernels import Backend, Case, StateDtype, StepOptions, Tensors, read_state, state_layout, step
from learnedopt.kernels.core import extension
from learnedopt.kernels.core.native import NativeBackend
from learnedopt.kernels.core.reference import ReferenceBackend
from learnedopt.rules import RULES, AdamLSTMRule, LSTMRule, MetaLSTMRule, State, UpdateRule, build_rule
from tests.kernels.support import whole_codes

# Below, of, and above a tile of 48, and none, also at the beginning; neighbours share tiles.
SHAPES = [(0, 2), (7, 13), (), (3,), (100,), (0,), (5, 20), (49,), (1,), (48,), (300, 4)]
each_kind = pytest.mark.parametrize("kind", ["lstm", "adam_lstm", "meta_lstm", "schedule_free", "rnnprop"])
takes_means = pytest.mark.parametrize("kind", ["adam_lstm", "schedule_free"])
each_state_dtype = pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    if reason := extension.why_unavailable():
        pytest.skip(reason)


LSTM = {"kind": "lstm_of_coordinates", "num_layers": 2, "hidden_size": 8}
"""The modulator with most to compute."""


def make_rule(kind: str, generator: Generator, scale: float = 0.2, **settings: Any) -> UpdateRule:
    """A rule with random weights; small ones let rounding errors die out over the steps."""
    if kind == "schedule_free":
        settings = {"modulator": LSTM, **settings}
    rule = build_rule({"kind": kind, **settings}).requires_grad_(False)
    for weight in rule.parameters():
        weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    if isinstance(rule, MetaLSTMRule):
        rule.forget_gate.bias.fill_(4.5)
        rule.input_gate.bias.fill_(-4.5)
    return rule


@dataclass
class Problem:
    """Parameters, state and a stream of gradients, the same for every backend."""

    rule: UpdateRule
    params: list[Tensor]
    states: list[State]
    state_dtype: StateDtype

    def tensors(self, grads: Sequence[Tensor], maximize: bool = False) -> Tensors:
        counts = [param.numel() for param in self.params]
        return Tensors(self.params, grads, self.states, torch.float32, self.state_dtype, counts, maximize=maximize)

    def memory(self, index: int) -> State:
        """State as the rule takes it."""
        layout = state_layout(self.rule, torch.float32, self.state_dtype)
        flat = {name: value.reshape(*layout[name].shape, -1) for name, value in self.states[index].items()}
        return read_state(flat, self.rule.state_spec(), torch.float32)


def make_problem(
    rule: UpdateRule, shapes: Sequence[tuple[int, ...]], state_dtype: StateDtype, dtype: torch.dtype = torch.float32
) -> Problem:
    generator = Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    layout = state_layout(rule, torch.float32, state_dtype)
    states = [
        {
            name: param.to(spec.dtype, copy=True)
            if spec.starts_at == "param"
            else torch.zeros(spec.shape + (tuple(param.shape) if spec.scope == "coordinate" else ()), dtype=spec.dtype)
            for name, spec in layout.items()
        }
        for param in params
    ]
    return Problem(rule, params, states, state_dtype)


def gradients(params: Sequence[Tensor], generator: Generator) -> list[Tensor]:
    """Of magnitudes from 1e-6 to 10, and some zeros."""
    grads = []
    for param in params:
        size = 10.0 ** (7.0 * torch.rand((), generator=generator) - 6.0)
        grad = size * torch.randn(param.shape, generator=generator)
        grads.append(torch.where(torch.rand(param.shape, generator=generator) < 0.1, 0.0, grad).to(param.dtype))
    return grads


def run(problem: Problem, backend: Backend, steps: int, maximize: bool = False) -> None:
    generator = Generator().manual_seed(2)
    for _ in range(steps):
        grads = gradients(problem.params, generator)
        loss = torch.rand((), generator=generator)
        step(backend, problem.rule, problem.tensors(grads, maximize), StepOptions(0.7, 0.1, loss))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@each_kind
@pytest.mark.parametrize("maximize", [False, True])
def test_fifty_steps_are_the_references(kind: str, maximize: bool, generator: Generator) -> None:
    # Where steps depend on correlations of whole tensors, larger random weights let rounding errors grow.
    rule = make_rule(kind, generator, 0.05 if kind == "schedule_free" else 0.2)
    native, reference = (make_problem(rule, SHAPES, "float32") for _ in range(2))
    run(native, NativeBackend(), 50, maximize)
    run(reference, ReferenceBackend(), 50, maximize)
    for index, (actual, expected) in enumerate(zip(native.params, reference.params)):
        assert_close(actual, expected, 2e-5)
        for name, value in reference.states[index].items():
            assert_close(native.states[index][name], value, 2e-5)


@each_kind
@each_state_dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_from_any_state_is_the_references(
    kind: str, state_dtype: StateDtype, dtype: torch.dtype, generator: Generator
) -> None:
    rule = make_rule(kind, generator)
    native, reference = (make_problem(rule, SHAPES, state_dtype, dtype) for _ in range(2))
    run(reference, ReferenceBackend(), 3)
    for index, param in enumerate(reference.params):
        native.params[index].copy_(param)
        for name, value in reference.states[index].items():
            native.states[index][name].copy_(value)
    run(native, NativeBackend(), 1)
    run(reference, ReferenceBackend(), 1)
    for index, (actual, expected) in enumerate(zip(native.params, reference.params)):
        assert_close(actual, expected, {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
        # What rounding leaves open: a unit in the last place, or a code.
        for name, value in reference.memory(index).items():
            is_vector = rule.state_spec()[name].shape != () and state_dtype != "float32"
            assert_close(native.memory(index)[name], value, 2.0**-6 if is_vector else 1e-5)
    if state_dtype != "float32":
        for name in ("h", "c"):
            kept = [[whole_codes(state, name) for state in problem.states] for problem in (native, reference)]
            different = sum(int((mine != its).sum()) for mine, its in zip(*kept))
            assert different < 0.01 * sum(its.numel() for its in kept[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "lstm", "preprocessing": "identity", "hidden_size": 7},
        {"kind": "lstm", "preprocessing_p": 3.0, "num_layers": 1, "hidden_size": 1, "output_scale": -2.0},
        {"kind": "lstm", "num_layers": 3, "hidden_size": 33},
        {"kind": "adam_lstm", "hidden_size": 5, "fast_decay": 0.3, "slow_decay": 0.999, "square_decay": 0.9},
        {"kind": "adam_lstm", "nominal_step": 0.1, "eps": 1e-3, "mix_bound": 0.5, "log_step_bound": 2.0},
        {"kind": "adam_lstm", "max_time": 2.0, "log_step_gain": 0.5},
        {
            "kind": "schedule_free",
            "modulator": LSTM | {"hidden_size": 5},
            "momentum_decay": 0.3,
            "square_decay": 0.9,
            "eps": 1e-3,
        },
        {
            "kind": "schedule_free",
            "nominal_step": 0.1,
            "mix_bound": 0.5,
            "log_step_bound": 2.0,
            "modulator": LSTM | {"num_layers": 1},
        },
        {
            "kind": "schedule_free",
            "modulator": LSTM,
            "interpolation": 0.2,
            "averaging_power": 0.5,
            "log_averaging_bound": 0.3,
        },
        {"kind": "schedule_free", "max_time": 2.0, "log_step_gain": 0.5, "modulator": {"kind": "power_laws"}},
        {"kind": "rnnprop", "hidden_size": 5, "momentum_decay": 0.3, "square_decay": 0.9, "eps": 1e-3},
        {"kind": "rnnprop", "num_layers": 1, "output_scale": 0.01},
        {"kind": "meta_lstm", "gate_feedback": "preactivation", "gradient_divisor": 25.0, "preprocessing_p": 7.0},
    ],
    ids=str,
)
def test_every_setting_is_heeded(settings: dict[str, Any], generator: Generator) -> None:
    kind, rest = str(settings["kind"]), {key: value for key, value in settings.items() if key != "kind"}
    rule = make_rule(kind, generator, **rest)
    native, reference = (make_problem(rule, SHAPES, "float32") for _ in range(2))
    run(native, NativeBackend(), 5)
    run(reference, ReferenceBackend(), 5)
    for actual, expected in zip(native.params, reference.params):
        assert_close(actual, expected, 1e-5)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@each_state_dtype
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("of_grad", ["transposed", "offset"])
def test_memory_layouts_do_not_matter(
    state_dtype: StateDtype, of_param: str, of_grad: str, generator: Generator
) -> None:
    rule = make_rule("adam_lstm", generator, hidden_size=4)
    shape = (2, 61, 10, 9)  # more than a block
    plain, strided = (make_problem(rule, [shape, (5,)], state_dtype) for _ in range(2))
    strided.params[0] = LAYOUTS[of_param](strided.params[0])
    for _ in range(3):
        grads = gradients(plain.params, generator)
        step(NativeBackend(), rule, plain.tensors(grads), StepOptions(1.0, 0.0))
        grads[0] = LAYOUTS[of_grad](grads[0])
        step(NativeBackend(), rule, strided.tensors(grads), StepOptions(1.0, 0.0))
    for index in range(2):
        assert_close(strided.params[index], plain.params[index], 1e-5)
        for name, value in plain.memory(index).items():
            assert_close(strided.memory(index)[name], value, 1e-5 if state_dtype == "float32" else 2.0**-6)


@each_kind
def test_at_a_learning_rate_of_zero_only_state_changes(kind: str, generator: Generator) -> None:
    problem = make_problem(make_rule(kind, generator), [(60,)], "float32")
    before = problem.params[0].clone()
    grads = [torch.full((60,), math.nan)]
    step(NativeBackend(), problem.rule, problem.tensors(grads), StepOptions(0.0, 0.1, torch.tensor(1.0)))
    assert torch.equal(problem.params[0], before)
    assert problem.states[0]["h"].isnan().any()


@each_kind
@each_state_dtype
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, 1e-42])
def test_extreme_gradients_do_what_they_do_to_the_reference(
    kind: str, state_dtype: StateDtype, value: float, generator: Generator
) -> None:
    rule = make_rule(kind, generator)
    native, reference = (make_problem(rule, [(70,), (30,)], state_dtype) for _ in range(2))
    for problem, backend in ((native, NativeBackend()), (reference, ReferenceBackend())):
        for seed in range(2):
            grads = gradients(problem.params, Generator().manual_seed(seed))
            grads[0][50] = value
            step(backend, rule, problem.tensors(grads), StepOptions(1.0, 0.0, torch.tensor(0.5)))
    for index in range(2):
        assert_close(native.params[index], reference.params[index], 1e-3)
        for name, values in reference.memory(index).items():
            assert_close(native.memory(index)[name], values, 1e-5 if state_dtype == "float32" else 2.0**-6)


@takes_means
def test_statistics_are_the_rules(kind: str, generator: Generator) -> None:
    rule = make_rule(kind, generator)
    problem = make_problem(rule, [*SHAPES, (20000,)], "float32")
    run(problem, NativeBackend(), 2)
    tensors = replace(problem.tensors(gradients(problem.params, generator)), together=100)
    actual, state = NativeBackend().statistics(rule, tensors, None)
    expected, expected_state = ReferenceBackend().statistics(rule, tensors, None)
    assert_close(actual, expected, 1e-5)
    assert torch.equal(state["step"], expected_state["step"])


@takes_means
def test_sums_over_shards_are_asked_for_once(kind: str, generator: Generator) -> None:
    """Two processes of one half each see the statistics of the whole."""
    rule = make_rule(kind, generator)
    whole = make_problem(rule, [(90,)], "float32")
    grad = gradients(whole.params, generator)[0]
    expected, _ = NativeBackend().statistics(rule, whole.tensors([grad]), None)

    sums: list[Tensor] = []

    def shard(part: slice, total: Callable[[Tensor], Tensor]) -> Tensor:
        params, state = (
            [whole.params[0][part]],
            {name: x[..., part] if x.dim() else x for name, x in whole.states[0].items()},
        )
        tensors = Tensors(params, [grad[part]], [state], torch.float32, "float32", [90], total)
        return NativeBackend().statistics(rule, tensors, None)[0]

    def keep(own: Tensor) -> Tensor:
        sums.append(own)
        return own

    shard(slice(40), keep)
    assert_close(shard(slice(40, 90), lambda own: own + sums[0]), expected, 1e-6)
    assert len(sums) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_every_run_gives_the_same_bits(threads: int, generator: Generator) -> None:
    rule = make_rule("adam_lstm", generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problems = [make_problem(rule, [(1700,), (33,), (3000,)], "bfloat16") for _ in range(3)]
        for problem in problems:
            run(problem, NativeBackend(), 3)
    finally:
        torch.set_num_threads(before)
    for problem in problems[1:]:
        assert all(torch.equal(one, other) for one, other in zip(problems[0].params, problem.params))


def test_autograd_is_told_that_parameters_change(generator: Generator) -> None:
    problem = make_problem(make_rule("lstm", generator), [(5,)], "float32")
    problem.params[0].requires_grad_()
    loss = problem.params[0].square().sum()
    with torch.no_grad():
        step(NativeBackend(), problem.rule, problem.tensors([torch.ones(5)]), StepOptions(1.0, 0.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_it_cannot_serve_is_said() -> None:
    class Mine(LSTMRule):
        pass

    backend, cpu = NativeBackend(), torch.device("cpu")

    def refusal(rule: UpdateRule, device: torch.device = cpu, dtype: torch.dtype = torch.float32) -> str | None:
        return backend.refusal(Case(rule, device, dtype, "float32"))

    assert refusal(LSTMRule()) is None
    assert "cuda" in str(refusal(LSTMRule(), torch.device("cuda")))
    assert "float64" in str(refusal(AdamLSTMRule(), dtype=torch.float64))
    assert "Mine" in str(refusal(Mine()))
    assert "preprocessing_p" in str(refusal(build_rule({"kind": "lstm", "preprocessing_p": 90.0})))


def test_once_compiled_it_is_ready() -> None:
    assert NativeBackend().unprepared() is None
    NativeBackend().prepare()


def test_rules_of_the_package_are_served() -> None:
    served = [
        kind
        for kind in RULES
        if NativeBackend().refusal(Case(build_rule({"kind": kind}), torch.device("cpu"), torch.float32, "int8")) is None
    ]
    assert {"lstm", "adam_lstm", "meta_lstm", "schedule_free", "rnnprop"} <= set(served)
