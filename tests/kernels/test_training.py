"""The compiled LSTM is the rule's LSTM, values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Generator, Tensor

from learnedopt.kernels.core import extension
from learnedopt.kernels.lstm_training import NativeLSTM, fused
from learnedopt.meta import start_episode, unroll
from learnedopt.rules import ScheduleFreeRule, UpdateRule
from learnedopt.rules.recurrent import CoordinatewiseLSTM
from tests.meta.support import FAMILIES, KINDS, random_rule

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# Widths of a tile are 8 or 16 times 3 and fractions of that: sizes around them, below and of several.
SHAPES = [
    (2, 20, 2, 0),
    (2, 20, 2, 1),
    (9, 20, 2, 17),
    (2, 8, 2, 49),
    (1, 1, 1, 24),
    (3, 7, 3, 101),
    (4, 20, 1, 1000),
    (17, 33, 2, 48),
]


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    if reason := extension.why_unavailable():
        pytest.skip(reason)


def network(inputs: int, hidden: int, layers: int, dtype: torch.dtype, generator: Generator) -> CoordinatewiseLSTM:
    lstm = CoordinatewiseLSTM(inputs, hidden, layers).to(dtype)
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(hidden))
    return lstm


def arguments(lstm: CoordinatewiseLSTM, n: int, generator: Generator) -> list[Tensor]:
    """Features and state of ``n`` coordinates."""
    weight = lstm.input_weights[0]
    state = (lstm.num_layers, lstm.hidden_size, n)
    shapes = [(weight.shape[1], n), state, state]
    return [torch.randn(shape, generator=generator).to(weight.dtype).requires_grad_() for shape in shapes]


def gradients(lstm: CoordinatewiseLSTM, args: list[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Of the outputs' products with cotangents, those that there are, with respect to arguments and weights."""
    pairs = [(out, cot) for out, cot in zip(lstm(*args), cotangents) if cot is not None]
    inputs = [*args, *lstm.parameters()]
    outputs, given = zip(*pairs)
    found = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to a share of the largest entry."""
    assert actual.shape == expected.shape
    scale = expected.detach().abs().max().clamp(min=1.0) if expected.numel() else expected.new_ones(())
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0.0, atol=TOLERANCE[expected.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_and_its_gradients_are_the_references(
    shape: tuple[int, int, int, int], dtype: torch.dtype, generator: Generator
) -> None:
    inputs, hidden, layers, n = shape
    lstm = network(inputs, hidden, layers, dtype, generator)
    args = arguments(lstm, n, generator)
    expected = lstm(*args)
    for actual, wanted in zip(NativeLSTM(lstm)(*args), expected):
        assert_close(actual, wanted)
    cotangents = [torch.randn(out.shape, generator=generator).to(dtype) for out in expected]
    for actual, wanted in zip(gradients(NativeLSTM(lstm), args, cotangents), gradients(lstm, args, cotangents)):
        assert_close(actual, wanted)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_outputs_that_nothing_depends_on_may_have_no_gradient(used: tuple[int, ...], generator: Generator) -> None:
    lstm = network(2, 4, 2, torch.float64, generator)
    args = arguments(lstm, 50, generator)
    cotangents = [
        torch.randn(out.shape, generator=generator).to(out) if index in used else None
        for index, out in enumerate(lstm(*args))
    ]
    for actual, wanted in zip(gradients(NativeLSTM(lstm), args, cotangents), gradients(lstm, args, cotangents)):
        assert_close(actual, wanted)


def test_gradients_are_finite_differences(generator: Generator) -> None:
    lstm = NativeLSTM(network(2, 3, 2, torch.float64, generator))
    args = arguments(lstm, 5, generator)

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        *features, w0, w1, r0, r1, b0, b1 = inputs
        names = [name for name, _ in lstm.named_parameters()]
        return torch.func.functional_call(lstm, dict(zip(names, (w0, w1, r0, r1, b0, b1))), tuple(features))

    assert torch.autograd.gradcheck(step, (*args, *lstm.parameters()))


def test_strides_do_not_matter(generator: Generator) -> None:
    lstm = network(3, 4, 2, torch.float64, generator)
    args = arguments(lstm, 60, generator)
    strided = [arg.detach().mT.contiguous().mT.requires_grad_() for arg in args]
    cotangents = [torch.randn(out.shape, generator=generator).to(out).mT.contiguous().mT for out in lstm(*args)]
    with torch.no_grad():
        for weight in lstm.input_weights:
            weight.set_(weight.mT.contiguous().mT)
    for actual, wanted in zip(gradients(NativeLSTM(lstm), strided, cotangents), gradients(lstm, args, cotangents)):
        assert_close(actual, wanted)


def test_inputs_that_are_constants_get_no_gradient(generator: Generator) -> None:
    lstm = network(2, 4, 2, torch.float64, generator)
    x, h, c = arguments(lstm, 10, generator)
    top, _, _ = NativeLSTM(lstm)(x.detach(), h.detach(), c.detach())
    top.sum().backward()
    found = [weight.grad for weight in lstm.parameters()]
    lstm.zero_grad()
    lstm(x.detach(), h.detach(), c.detach())[0].sum().backward()
    for actual, weight in zip(found, lstm.parameters()):
        assert actual is not None and weight.grad is not None
        assert_close(actual, weight.grad)
    with torch.no_grad():
        assert not NativeLSTM(lstm)(x, h, c)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, -math.inf, 100.0, -100.0])
def test_extreme_features_saturate_as_in_the_reference(value: float, dtype: torch.dtype, generator: Generator) -> None:
    lstm = network(1, 6, 2, dtype, generator)
    x, h, c = arguments(lstm, 3, generator)
    with torch.no_grad():
        x[:, 1] = value
    for actual, wanted in zip(NativeLSTM(lstm)(x, h, c), lstm(x, h, c)):
        assert wanted.isfinite().all()
        assert_close(actual, wanted)
    if math.isinf(value):
        return  # its gradient is zero times infinity
    cotangents = [torch.ones_like(out) for out in lstm(x, h, c)]
    for actual, wanted in zip(
        gradients(NativeLSTM(lstm), [x, h, c], cotangents), gradients(lstm, [x, h, c], cotangents)
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize("entry", [0, 1, 2], ids=["x", "h", "c"])
def test_a_nan_stays_with_its_coordinate(entry: int, generator: Generator) -> None:
    lstm = network(2, 5, 2, torch.float32, generator)
    args = arguments(lstm, 40, generator)
    with torch.no_grad():
        args[entry][..., 7] = math.nan
    for actual, wanted in zip(NativeLSTM(lstm)(*args), lstm(*args)):
        torch.testing.assert_close(actual, wanted, rtol=0.0, atol=2e-6, equal_nan=True)
        assert actual[..., 7].isnan().any()


def test_infinite_cells_are_kept(generator: Generator) -> None:
    lstm = network(2, 5, 1, torch.float32, generator)
    args = arguments(lstm, 20, generator)
    with torch.no_grad():
        args[2][0, :, 3], args[2][0, :, 4] = math.inf, -math.inf
    for actual, wanted in zip(NativeLSTM(lstm)(*args), lstm(*args)):
        torch.testing.assert_close(actual, wanted, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_run_gives_the_same_bits(threads: int, generator: Generator) -> None:
    lstm = NativeLSTM(network(2, 20, 2, torch.float32, generator))
    args = arguments(lstm, 4000, generator)
    cotangents = [torch.randn(out.shape, generator=generator) for out in lstm(*args)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [gradients(lstm, args, cotangents) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run))
    for one, other in zip(runs[0], gradients(lstm, args, cotangents)):
        assert_close(one, other)


def test_second_derivatives_are_refused(generator: Generator) -> None:
    lstm = NativeLSTM(network(2, 3, 1, torch.float64, generator))
    args = arguments(lstm, 4, generator)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(lstm(*args)[0].sum(), args[0], create_graph=True)


def test_what_the_kernel_cannot_run_is_refused(generator: Generator) -> None:
    lstm = NativeLSTM(network(2, 3, 1, torch.float32, generator))
    x, h, c = arguments(lstm, 4, generator)
    with pytest.raises(RuntimeError, match="on the CPU, and a tensor is on meta"):
        lstm(x.to("meta"), h, c)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        lstm(x.half(), h, c)
    with pytest.raises(RuntimeError, match="expected scalar type Double but found Float"):
        lstm(x.double(), h, c)
    with pytest.raises(RuntimeError, match=r"h and c must be \[1, 3, 4\]"):
        lstm(x, h[..., :3], c)
    with pytest.raises(RuntimeError, match=r"weights of layer 0 must be \[12, 1\]"):
        lstm(x[:1], h, c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradients_are_those_of_the_plain_rule(kind: str, family: str, second_order: bool) -> None:
    rule = random_rule(kind)
    if not any(isinstance(module, CoordinatewiseLSTM) for module in rule.modules()):
        pytest.skip("this rule has no LSTM")

    def meta_gradients(runner: UpdateRule) -> list[Tensor]:
        generator = Generator().manual_seed(0)
        episode = start_episode(runner, FAMILIES[family].draw(generator, 2), generator)
        losses, _ = unroll(runner, episode, 6, generator, second_order=second_order)
        return [losses, *torch.autograd.grad(losses.sum(), list(rule.parameters()))]

    tolerance = 1e-6 if kind == "in_eigenbases" else 1e-9  # bases turn what differs by rounding into one another
    for actual, wanted in zip(meta_gradients(fused(rule)), meta_gradients(rule)):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_rule_shares_everything_and_changes_nothing(kind: str) -> None:
    rule = random_rule(kind)
    names = [name for name, _ in rule.named_parameters()]
    fast = fused(rule)
    assert type(fast) is type(rule)
    assert fast.config is rule.config
    assert not any(isinstance(module, NativeLSTM) for module in rule.modules())
    assert [name for name, _ in fast.named_parameters()] == names
    assert all(mine is its for mine, its in zip(rule.parameters(), fast.parameters()))
    twin = copy.deepcopy(fast)
    assert not {id(mine) for mine in twin.parameters()} & {id(its) for its in rule.parameters()}


def test_a_rule_without_an_lstm_is_left_as_it_is() -> None:
    rule = ScheduleFreeRule()
    assert fused(rule) is rule
