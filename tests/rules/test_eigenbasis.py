"""The rule in eigenbases: against a naive loop, and what it keeps of matrices."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from learnedopt.meta.evolution import PerCopy, flat_weights
from learnedopt.rules import InEigenbases, InEigenbasesConfig, ScheduleFreeConfig, Segments, State
from learnedopt.rules.moments import momentum_bound
from tests.rules.support import Advancing, generator, property_test, random_rule, random_values, run

SHAPES = [(4, 3), (5,), (2, 3, 2), (), (1, 4)]
SIZES = [12, 5, 12, 1, 4]
DIRECTIONS = ("momentum", "offset")


def make_rule(dtype: torch.dtype = torch.float64, scale: float = 0.4, **settings: Any) -> InEigenbases:
    inner = {name: settings.pop(name) for name in list(settings) if name in ("eps", "nominal_step")}
    frame = ScheduleFreeConfig(square_decay=0.99, **inner).to_dict()
    config = {"kind": "in_eigenbases", "inner": frame, "settling": 2, "interval": 3} | settings
    rule = random_rule(config, dtype, scale=scale)
    assert isinstance(rule, InEigenbases)
    return rule


class NaiveMatrix:
    """One matrix, one rule: directions are kept as they are and taken to the bases anew in every step.

    The rule has no LSTM here, so that of its state only second moments are of coordinates.
    """

    def __init__(self, rule: InEigenbases, rows: int, columns: int, together: int) -> None:
        self.rule, self.config, self.segments = rule, rule.config, Segments([rows * columns])
        self.segments.together = together
        self.state: State = {}
        self.factors = [np.zeros((side, side)) for side in (rows, columns)]
        self.bases = [np.eye(side) for side in (rows, columns)]
        self.shape, self.step = (rows, columns), 0

    def update(self, param: NDArray[np.float64], grad: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.state:
            start = torch.from_numpy(param.reshape(-1))
            self.state = self.rule.inner.init_state(self.segments, dtype=torch.float64, param=start)
        self.step += 1
        norm = np.linalg.norm(grad)
        unit = grad / norm if norm else grad
        before_step = list(self.bases)
        for side, square in enumerate((unit @ unit.T, unit.T @ unit)):
            self.factors[side] = self.config.factor_decay * self.factors[side] + (1 - self.config.factor_decay) * square
            if self.step <= self.config.settling or self.step % self.config.interval == 0:
                factor = self.factors[side] + self.config.shift * np.trace(self.factors[side]) * np.eye(len(square))
                for _ in range(4 if self.step == 1 else 1):
                    order = np.argsort(-np.diag(self.bases[side].T @ factor @ self.bases[side]), kind="stable")
                    basis, triangle = np.linalg.qr(factor @ self.bases[side][:, order])
                    self.bases[side] = basis * np.where(np.diag(triangle) < 0.0, -1.0, 1.0)
        left, right = self.bases

        def enter(x: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy((left.T @ x @ right).reshape(-1))

        def leave(x: Tensor) -> NDArray[np.float64]:
            return left @ x.numpy().reshape(self.shape) @ right.T

        inside = dict(self.state)
        for name in DIRECTIONS:
            inside[name] = enter(self.state[name].numpy().reshape(self.shape))
        turns = [basis.T @ before for basis, before in zip(self.bases, before_step)]
        square = turns[0] ** 2 @ self.state["square"].numpy().reshape(self.shape) @ turns[1].T ** 2
        inside["square"] = torch.from_numpy(square.reshape(-1))
        if not np.array_equal(turns[0], np.eye(self.shape[0])):
            frame = cast(ScheduleFreeConfig, self.config.inner)
            most = momentum_bound(frame.momentum_decay, frame.square_decay) * inside["square"].sqrt()
            inside["momentum"] = inside["momentum"].clamp(-most, most)
        slope = enter(grad)
        slope[slope.abs() <= 1e-6 * norm] = 0.0
        with torch.no_grad():
            inside["origin"] = enter(self.state["origin"].numpy().reshape(self.shape))
            delta, after = self.rule.inner.update(enter(param), slope, inside, self.segments)
            self.state = {**after, "origin": self.state["origin"]}
        for name in DIRECTIONS:
            self.state[name] = torch.from_numpy(leave(self.state[name]).reshape(-1))
        return leave(delta)


@pytest.mark.parametrize("copies", [1, 2])
def test_updates_are_those_of_a_naive_loop(copies: int) -> None:
    rule, segments = make_rule(), Segments(SIZES, copies, SHAPES)
    n, steps = segments.num_coordinates, 12
    params, grads = (torch.randn(steps, n, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
    for copy in range(copies):
        first = copy * sum(SIZES)
        for shape, size in zip(SHAPES, SIZES):
            part = slice(first, first + size)
            first += size
            if len(shape) < 2 or shape[0] == 1:
                alone = Segments([size])
                alone.together = len(SIZES)
                with torch.no_grad():
                    expected = run(rule.inner, alone, params[:, part], grads[:, part])[0]
            else:
                naive = NaiveMatrix(rule, shape[0], size // shape[0], len(SIZES))
                pairs = [(x[:, part].reshape(steps, *naive.shape).numpy()) for x in (params, grads)]
                moves = [naive.update(param, grad).reshape(-1) for param, grad in zip(*pairs)]
                expected = torch.from_numpy(np.stack(moves))
            torch.testing.assert_close(deltas[:, part], expected, rtol=1e-7, atol=1e-9)


def test_bases_become_those_of_the_gradients() -> None:
    """Of gradients whose rows and columns have been mixed, the factors are diagonal in them."""
    rule, segments = make_rule(interval=1), Segments([20], shapes=[(4, 5)])
    mix = [torch.linalg.qr(torch.randn(d, d, generator=generator(d), dtype=torch.float64)).Q for d in (4, 5)]
    scales = [torch.logspace(0, -2, d, dtype=torch.float64) for d in (4, 5)]
    noise = torch.randn(400, 4, 5, generator=generator(1), dtype=torch.float64)
    grads = mix[0] @ (scales[0].unsqueeze(1) * noise * scales[1]) @ mix[1].mT
    with torch.no_grad():
        _, state = run(rule, segments, torch.ones(400, 20, dtype=torch.float64), grads.flatten(1))
    for side, d in (("left", 4), ("right", 5)):
        factor, basis = (state[f"{side}_{what}"].view(d, d) for what in ("factor", "basis"))
        torch.testing.assert_close(basis.mT @ basis, torch.eye(d, dtype=torch.float64))
        turned = basis.mT @ factor @ basis
        correlation = turned / (turned.diagonal().sqrt().unsqueeze(1) * turned.diagonal().sqrt())
        assert (correlation - torch.eye(d, dtype=torch.float64)).abs().max() < 0.05
        assert (turned.diagonal().diff() < 0.0).all()


@property_test
@given(seed=st.integers(0, 1000), random=st.randoms(use_true_random=False))
def test_permuting_rows_and_columns_permutes_updates(seed: int, random: Any) -> None:
    rule, segments = make_rule(), Segments([12], shapes=[(3, 4)])
    params, grads = (torch.randn(7, 3, 4, generator=generator(seed + i), dtype=torch.float64) for i in (0, 1))
    rows, columns = random.sample(range(3), 3), random.sample(range(4), 4)
    with torch.no_grad():
        deltas = run(rule, segments, params.flatten(1), grads.flatten(1))[0].view(7, 3, 4)
        permuted = [x[:, rows][:, :, columns].flatten(1) for x in (params, grads)]
        moved = run(rule, segments, *permuted)[0].view(7, 3, 4)
    torch.testing.assert_close(moved, deltas[:, rows][:, :, columns], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@property_test
@given(seed=st.integers(0, 1000))
def test_rows_and_columns_without_gradient_stay_where_they_are(dtype: torch.dtype, seed: int) -> None:
    rule, segments = make_rule(dtype), Segments([20], shapes=[(4, 5)])
    params, grads = (random_values((12, 4, 5), seed + i, dtype) for i in (0, 2))
    grads[:, 1], grads[:, :, 3] = 0.0, 0.0
    with torch.no_grad():
        deltas = run(rule, segments, params.flatten(1), grads.flatten(1))[0].view(12, 4, 5)
    assert (deltas[:, 1] == 0.0).all()
    assert (deltas[:, :, 3] == 0.0).all()
    assert (deltas[:, 0, 0] != 0.0).any()


@pytest.mark.parametrize("scale", [1e-6, 1e12])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    rule, segments = make_rule(torch.float32, eps=1e-18), Segments([20], shapes=[(4, 5)])
    params, grads = (torch.randn(12, 20, generator=generator(seed)) for seed in (0, 1))
    with torch.no_grad():
        expected, actual = (run(rule, segments, params, grads * factor)[0] for factor in (1.0, scale))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_directions_without_gradient_are_not_scaled_up_from_rounding_errors() -> None:
    """All gradients are multiples of one matrix of rank one, and so are all updates."""
    rule, segments = make_rule(torch.float32, scale=0.0), Segments([42], shapes=[(6, 7)])
    direction = torch.outer(torch.randn(6, generator=generator(0)), torch.randn(7, generator=generator(1)))
    sizes = torch.rand(20, 1, generator=generator(2)) + 0.5
    with torch.no_grad():
        deltas, _ = run(rule, segments, torch.ones(20, 42), sizes * direction.flatten())
    unit = direction.flatten() / direction.norm()
    across = deltas - (deltas @ unit).unsqueeze(1) * unit
    assert across.norm() < 1e-4 * deltas.norm()


def test_a_side_that_is_too_long_has_no_basis() -> None:
    rule = make_rule(max_side=3)
    for served, side in (((3, 4), "left"), ((4, 3), "right")):
        own = rule.coordinates.initial(served, torch.float64, None)
        assert {name: value.shape for name, value in own.items()} == {
            f"{side}_factor": (3, 3),
            f"{side}_basis": (3, 3),
            "age": (),
        }
    for shape in ((4, 4), (3, 2, 2, 0), (3,), (), (1, 3), (3, 1, 1)):
        assert not rule.coordinates.serve(shape)
        assert rule.coordinates.initial(shape, torch.float64, None) == {}
    segments = Segments([16], shapes=[(4, 4)])
    params, grads = random_values((5, 16), 0), random_values((5, 16), 1)
    with torch.no_grad():
        without = run(rule.inner, segments, params, grads)[0]
        assert torch.equal(run(rule, segments, params, grads)[0], without)
        assert not torch.allclose(run(make_rule(), segments, params, grads)[0], without, rtol=0.1)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_change_of_a_matrix_is_bounded(scale: float) -> None:
    rule, segments = make_rule(scale=scale), Segments([20], shapes=[(4, 5)])
    params, grads = random_values((40, 20), 0), random_values((40, 20), 1)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
    assert deltas.square().mean(1).sqrt().max() <= rule.update_bound()


def test_copies_have_bases_and_may_have_weights_of_their_own() -> None:
    rules = [make_rule(), make_rule(scale=0.1)]
    single, both = (Segments(SIZES, copies, SHAPES) for copies in (1, 2))
    n = single.num_coordinates
    start = random_values((2 * n,), 0)
    state = rules[0].init_state(both, torch.float64, param=start)
    alone = [rule.init_state(single, torch.float64, param=start[i * n : (i + 1) * n]) for i, rule in enumerate(rules)]
    per_copy = PerCopy(rules[0], torch.stack([flat_weights(rule) for rule in rules]))
    with torch.no_grad():
        for step in range(5):
            param, grad = random_values((2 * n,), step), random_values((2 * n,), step + 10)
            deltas, state = per_copy.update(param, grad, state, both)
            for i, rule in enumerate(rules):
                here = slice(i * n, (i + 1) * n)
                delta, alone[i] = rule.update(param[here], grad[here], alone[i], single)
                torch.testing.assert_close(deltas[here], delta, rtol=1e-8, atol=1e-10)
    assert state.keys() == alone[0].keys()


def test_derivatives_by_the_weights_agree_with_finite_differences() -> None:
    rule, segments = make_rule(), Segments([6, 2], shapes=[(2, 3), (2,)])
    names = [name for name, _ in rule.named_parameters()]
    params, grads = (torch.randn(4, 8, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))

    def function(*weights: Tensor) -> Tensor:
        def advance(*args: Any, own: tuple[Tensor, Tensor]) -> tuple[Tensor, State]:
            return torch.func.functional_call(advancing, values, args, {"own": own})

        values = {f"rule.{name}": weight for name, weight in zip(names, weights)}
        moved: State = rule.init_state(segments, torch.float64, param=params[0])
        deltas = []
        for param, grad in zip(params, grads):
            delta, moved = rule.update(param, grad, moved, segments, advance=advance)
            deltas.append(delta)
        return torch.stack(deltas)

    advancing = Advancing(rule)
    weights = [weight.detach().requires_grad_() for weight in rule.parameters()]
    assert torch.autograd.gradcheck(function, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e-42])
def test_extreme_gradients_are_not_errors(value: float) -> None:
    rule, segments = make_rule(torch.float32), Segments([6], shapes=[(2, 3)])
    grads = torch.ones(4, 6)
    grads[1] = value
    with torch.no_grad():
        deltas, _ = run(rule, segments, torch.ones(4, 6), grads)
    assert deltas[0].isfinite().all()
    assert deltas.isfinite().all() == (not math.isnan(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor_decay", 1.0),
        ("factor_decay", -0.1),
        ("shift", -0.1),
        ("shift", float("inf")),
        ("settling", 0),
        ("interval", 0),
        ("max_side", -1),
    ],
)
def test_settings_out_of_range_are_errors(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        InEigenbases(InEigenbasesConfig(**{name: value}))


def test_bases_wait_for_the_first_gradient_of_each_copy() -> None:
    """Copies that begin later go on as they would have alone."""
    rule, single, both = make_rule(), Segments([12], shapes=[(4, 3)]), Segments([12], 2, [(4, 3)])
    params, grads = torch.zeros(9, 2, 12, dtype=torch.float64), torch.randn(9, 2, 12, generator=generator(1)).double()
    grads[:3, 1] = 0.0
    with torch.no_grad():
        deltas, state = run(rule, both, params.flatten(1), grads.flatten(1))
        for copy in range(2):
            alone, its = run(rule, single, params[:, copy], grads[:, copy])
            torch.testing.assert_close(deltas.view(9, 2, 12)[:, copy], alone, rtol=1e-10, atol=1e-12)
            assert int(its["age"]) == int(state["age"][copy]) == (9 if copy == 0 else 6)


@pytest.mark.parametrize("kind", ["lstm", "adam_lstm", "rnnprop", "separate_lstm", "meta_lstm"])
def test_any_rule_runs_in_bases(kind: str) -> None:
    """One step, in the bases that its own gradient gives: there, then the rule, then back."""
    rule, segments = random_rule({"kind": "in_eigenbases", "inner": {"kind": kind}}), Segments([12], shapes=[(4, 3)])
    assert isinstance(rule, InEigenbases)
    param, grad = torch.randn(2, 12, generator=generator(2), dtype=torch.float64)
    loss = torch.tensor(0.7, dtype=torch.float64)
    with torch.no_grad():
        delta, state = rule.update(param, grad, rule.init_state(segments, torch.float64), segments, loss)
        left, right = state["left_basis"].view(4, 4), state["right_basis"].view(3, 3)
        there, slope = ((left.mT @ x.view(4, 3) @ right).flatten() for x in (param, grad))
        slope[slope.abs() <= 1e-6 * grad.norm()] = 0.0
        alone, _ = rule.inner.update(there, slope, rule.inner.init_state(segments, torch.float64), segments, loss)
        without, _ = rule.inner.update(param, grad, rule.inner.init_state(segments, torch.float64), segments, loss)
    torch.testing.assert_close(delta.view(4, 3), left @ alone.view(4, 3) @ right.mT, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(delta, without, rtol=0.1)


def test_bases_inside_bases_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot have bases inside"):
        InEigenbases(InEigenbasesConfig(inner=InEigenbasesConfig()))


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((512, 512), {"left": (1, 512), "right": (1, 512)}),
        ((513, 512), {"left": (3, 171), "right": (1, 512)}),  # no cliff
        ((768, 3072), {"left": (2, 384), "right": (6, 512)}),
        ((4096, 4096), {"left": (8, 512), "right": (8, 512)}),
        ((512, 128), {"left": (2, 256), "right": (1, 128)}),
        ((128, 32), {"left": (1, 128), "right": (1, 32)}),  # small enough to be whole
        ((8, 768), {"left": (1, 8)}),
        ((512, 1, 3, 3), {"right": (1, 9)}),
        ((50257, 384), {"right": (1, 384)}),
        ((521, 521), {}),  # a prime
        ((7,), {}),
        ((1, 9), {}),
        ((0, 9), {}),
    ],
)
def test_long_sides_are_cut_and_very_long_ones_have_no_bases(
    shape: tuple[int, ...], sides: dict[str, tuple[int, int]]
) -> None:
    coordinates = InEigenbases(InEigenbasesConfig(blocks=True)).coordinates
    assert coordinates.sides(shape) == sides
    own = coordinates.initial(shape, torch.float32, torch.device("meta"))
    numbers = sum(values.numel() for values in own.values())
    assert 4 * numbers <= 34.0 * math.prod(shape) + 8


def test_blocks_of_a_side_have_factors_and_bases_of_their_own() -> None:
    rule, segments = make_rule(blocks=True, max_side=2), Segments([12], shapes=[(4, 3)])
    params, grads = (torch.randn(5, 12, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    with torch.no_grad():
        _, state = run(rule, segments, params, grads)
    factor, basis = (state[f"left_{what}"].view(2, 2, 2) for what in ("factor", "basis"))
    assert "right_factor" not in state  # three rows cannot be cut
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    for grad in grads.view(5, 2, 2, 3):
        expected = 0.99 * expected + 0.01 * (grad @ grad.mT) / grad.square().sum()
    torch.testing.assert_close(factor, expected)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2, dtype=torch.float64).expand(2, 2, 2))


def test_factors_that_take_in_every_third_gradient_decay_for_three() -> None:
    coordinates = InEigenbases(InEigenbasesConfig(settling=2, factor_interval=3)).coordinates
    decays = [coordinates.factor_decay(age) for age in range(1, 8)]
    assert decays == [0.99, 0.99, 0.99**3, None, None, 0.99**3, None]
