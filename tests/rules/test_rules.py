"""What every registered rule keeps, whatever its weights."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from learnedopt.rules import Segments, build_rule
from tests.rules.support import KINDS, VARIANTS, Advancing, property_test, random_rule, random_values, run, small

# Rules that look at tensors as wholes; for the others the borders between tensors mean nothing.
READS_TENSORS = {"adam_lstm", "schedule_free", "in_eigenbases", "laws", "chain"}

STEPS = 3

sizes_of_tensors = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 1000)


def inputs(segments: Segments, seed: int) -> tuple[Tensor, Tensor]:
    n = segments.num_coordinates
    return random_values((STEPS, n), seed), random_values((STEPS, n), seed + 2)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@given(sizes=sizes_of_tensors, seed=seeds, random=st.randoms(use_true_random=False))
def test_permuting_coordinates_within_tensors_permutes_updates(
    kind: str, sizes: list[int], seed: int, random: Random
) -> None:
    rule, segments = random_rule(kind), Segments(sizes)
    params, grads = inputs(segments, seed)
    order: list[int] = []
    for size in sizes:
        order += random.sample(range(len(order), len(order) + size), size)
    with torch.no_grad():
        assert_same(
            run(rule, segments, params[:, order], grads[:, order])[0], run(rule, segments, params, grads)[0][:, order]
        )


@pytest.mark.parametrize("kind", KINDS)
@property_test
@given(sizes=sizes_of_tensors, seed=seeds, random=st.randoms(use_true_random=False))
def test_permuting_tensors_permutes_updates(kind: str, sizes: list[int], seed: int, random: Random) -> None:
    rule, segments = random_rule(kind), Segments(sizes)
    params, grads = inputs(segments, seed)
    shuffled = random.sample(range(len(sizes)), len(sizes))
    parts = torch.arange(segments.num_coordinates).split(sizes)
    order = torch.cat([parts[t] for t in shuffled])
    with torch.no_grad():
        moved = run(rule, Segments([sizes[t] for t in shuffled]), params[:, order], grads[:, order])[0]
        assert_same(moved, run(rule, segments, params, grads)[0][:, order])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in READS_TENSORS])
@property_test
@given(first=st.integers(1, 5), second=st.integers(1, 5), seed=seeds)
def test_splitting_a_tensor_changes_nothing(kind: str, first: int, second: int, seed: int) -> None:
    rule, whole = random_rule(kind), Segments([first + second])
    params, grads = inputs(whole, seed)
    with torch.no_grad():
        split = run(rule, Segments([first, second]), params, grads)[0]
        assert_same(split, run(rule, whole, params, grads)[0])


@pytest.mark.parametrize("kind", sorted(READS_TENSORS))
def test_splitting_a_tensor_shows_to_rules_that_read_tensors(kind: str) -> None:
    rule, whole = random_rule(kind), Segments([6])
    params, grads = inputs(whole, 0)
    with torch.no_grad():
        split = run(rule, Segments([2, 4]), params, grads)[0]
        assert not torch.allclose(split, run(rule, whole, params, grads)[0], rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@property_test
@given(sizes=sizes_of_tensors, copies=st.integers(2, 4), seed=seeds)
def test_copies_do_not_see_each_other(kind: str, sizes: list[int], copies: int, seed: int) -> None:
    rule, single, together = random_rule(kind), Segments(sizes), Segments(sizes, copies)
    params, grads = inputs(together, seed)
    losses = random_values((STEPS, copies), seed + 4)
    with torch.no_grad():
        deltas = run(rule, together, params, grads, losses)[0].unflatten(1, (copies, -1))
        for copy in range(copies):
            param, grad = (x.unflatten(1, (copies, -1))[:, copy] for x in (params, grads))
            assert_same(deltas[:, copy], run(rule, single, param, grad, losses[:, copy])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if build_rule({"kind": kind}).zero_gradient_is_noop])
@property_test
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 100.0]))
def test_coordinates_without_gradient_stay_where_they_are(
    kind: str, dtype: torch.dtype, seed: int, scale: float
) -> None:
    rule, segments = random_rule(kind, dtype, seed, scale), Segments([4, 3])
    params, grads = (x.to(dtype) for x in inputs(segments, seed))
    # One coordinate among others that move, and a whole tensor.
    still = [1, 4, 5, 6]
    grads[:, still] = 0.0
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
    assert (deltas[:, still] == 0.0).all()
    assert (deltas[:, [0, 2, 3]] != 0.0).any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not build_rule({"kind": kind}).zero_gradient_is_noop])
def test_rules_that_do_not_promise_to_stay_move_without_gradient(kind: str) -> None:
    rule, segments = random_rule(kind), Segments([3])
    params, grads = inputs(segments, 0)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, torch.zeros_like(grads))
    assert (deltas.abs() > 1e-6 * params.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@property_test
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 1e-40, 1e-30, 1e-12, 1.0, 1e18, 1e30, -1e30]), min_size=3, max_size=3),
        min_size=2,
        max_size=6,
    )
)
def test_extreme_gradients_give_finite_updates_and_meta_gradients(
    kind: str, dtype: torch.dtype, rows: list[list[float]]
) -> None:
    rule, segments = random_rule(kind, dtype), Segments([2, 1])
    grads = torch.tensor(rows, dtype=dtype)
    params, losses = torch.ones_like(grads), torch.full((len(rows),), 1e30, dtype=dtype)
    deltas, state = run(rule, segments, params, grads, losses)
    assert deltas.isfinite().all()
    assert all(x.isfinite().all() for x in state.values())
    weights = list(rule.parameters())
    for meta_gradient in torch.autograd.grad(deltas.mean(), weights) if weights else ():
        assert meta_gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_alternating_extremes_give_finite_updates(kind: str) -> None:
    rule, segments = random_rule(kind, torch.float32), Segments([4])
    pattern = torch.tensor([1e30, 0.0, -1e30, 1e-30])
    grads = torch.stack([pattern.roll(step) for step in range(40)])
    with torch.no_grad():
        deltas, _ = run(rule, segments, torch.ones_like(grads), grads)
    assert deltas.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_finite_where_parameters_and_gradients_are_zero(kind: str) -> None:
    rule, segments = random_rule(kind), Segments([2, 3])
    zeros = torch.zeros(STEPS, 5, dtype=torch.float64)
    params, grads = zeros.clone().requires_grad_(), zeros.clone().requires_grad_()
    deltas, _ = run(rule, segments, params, grads)
    for derivative in torch.autograd.grad(deltas.sum(), [params, grads], materialize_grads=True):
        assert derivative.isfinite().all()


@pytest.mark.parametrize(
    "config", [*VARIANTS, pytest.param({"kind": "adam_lstm", "square_decay": 0.9}, id="adam_lstm-square")]
)
def test_derivatives_agree_with_finite_differences(config: dict[str, Any]) -> None:
    rule, segments = random_rule(small(config, 2)), Segments([2, 1])
    names = [name for name, _ in rule.named_parameters()]
    steps = 2
    # Away from the kinks: magnitudes of 0.3 to 2.
    magnitudes = torch.linspace(0.3, 2.0, 2 * steps * 3, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    params = (magnitudes[: steps * 3] * signs).view(steps, 3).requires_grad_()
    grads = (magnitudes[steps * 3 :] * signs.roll(2)).view(steps, 3).requires_grad_()
    losses = torch.tensor([1.7, 0.6], dtype=torch.float64, requires_grad=rule.needs_loss)

    def function(params: Tensor, grads: Tensor, losses: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        values = {f"rule.{name}": weight for name, weight in zip(names, weights)}
        state = rule.init_state(segments, dtype=torch.float64, param=params[0])
        deltas = []
        for param, grad, loss in zip(params, grads, losses):
            delta, after = functional_call(Advancing(rule), values, (param, grad, state, segments, loss))
            state = {**state, **after}
            deltas.append(delta)
        return (torch.stack(deltas), *(x for x in state.values() if x.requires_grad))

    weights = [weight.detach().requires_grad_() for weight in rule.parameters()]
    assert torch.autograd.gradcheck(function, (params, grads, losses, *weights))


@pytest.mark.parametrize("kind", KINDS)
def test_state_keeps_its_entries_shapes_and_values_given(kind: str) -> None:
    rule, segments = random_rule(kind), Segments([2, 3], copies=2)
    params, grads = inputs(segments, 0)
    state = rule.init_state(segments, dtype=torch.float64, param=params[0])
    assert {key: tuple(x.shape) for key, x in state.items()} == {
        key: (*spec.shape, 10 if spec.scope == "coordinate" else 4) for key, spec in rule.state_spec().items()
    }
    starts = {key: params[0] if spec.starts_at == "param" else 0.0 for key, spec in rule.state_spec().items()}
    assert all((x == starts[key]).all() and x.dtype == torch.float64 for key, x in state.items())
    given_values = [x.clone() for x in (params[0], grads[0], *state.values())]
    with torch.no_grad():
        _, new_state = rule.update(params[0], grads[0], state, segments, torch.tensor(1.0))
    assert {key: x.shape for key, x in new_state.items()} == {key: x.shape for key, x in state.items()}
    assert all(x.dtype == torch.float64 for x in new_state.values())
    assert all(torch.equal(x, y) for x, y in zip((params[0], grads[0], *state.values()), given_values))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_tensors_are_served(kind: str) -> None:
    rule = random_rule(kind)
    params, grads = inputs(Segments([3]), 0)
    with torch.no_grad():
        deltas, _ = run(rule, Segments([0, 3]), params, grads)
        assert_same(deltas, run(rule, Segments([3]), params, grads)[0])
        nothing, _ = run(rule, Segments([0]), params[:, :0], grads[:, :0])
    assert nothing.shape == (STEPS, 0)


@pytest.mark.parametrize(
    ("kind", "floats"),
    [
        ("lstm", 2 * 2 * 20),
        ("meta_lstm", 2 * 20 + 2),
        ("adam_lstm", 2 * 2 * 20 + 3),
        ("schedule_free", 4),
        ("normalized_gradient", 1),
        ("laws", 2),
        ("chain", 3),
        ("rnnprop", 2 * 2 * 20 + 2),
    ],
)
def test_state_bytes_per_parameter(kind: str, floats: int) -> None:
    rule = build_rule({"kind": kind})
    assert rule.state_bytes_per_parameter() == 4 * floats
    assert rule.state_bytes_per_parameter(torch.bfloat16) == 2 * floats
