"""The closed-form functions: their values, their minima, and what their draws promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.func import grad, vmap

from learnedopt.tasks import IllConditioned, Lasso, PiecewiseSquare, Rastrigin, Reparametrized, Rosenbrock, Sinusoid
from learnedopt.tasks.base import Params, Task, TaskFamily
from learnedopt.tasks.ill_conditioned import rotation

COPIES = 3
seeds = st.integers(0, 2**32)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def at(theta: Tensor) -> Params:
    return {"theta": theta}


def problem(task: Task, copy: int = 0) -> list[np.ndarray]:
    """The tensors that define one copy's function, as doubles."""
    return [tensor[copy].double().numpy() for tensor in task.sample(seeded())]


def value(task: Task, theta: np.ndarray, copy: int = 0) -> float:
    batch = tuple(tensor[copy].double() for tensor in task.sample(seeded()))
    return float(task.loss(at(torch.tensor(theta)), batch))


def piecewise_square(theta: np.ndarray, center: np.ndarray) -> float:
    return float(np.mean(np.clip((theta - center) ** 2, 0, 10)))


def lasso(theta: np.ndarray, matrix: np.ndarray, target: np.ndarray) -> float:
    return float(0.5 * np.linalg.norm(matrix @ theta - target) ** 2 + 0.005 * np.abs(theta).sum())


def rastrigin(theta: np.ndarray, matrix: np.ndarray, target: np.ndarray, depth: np.ndarray) -> float:
    bowl = 0.5 * np.linalg.norm(matrix @ theta - target) ** 2
    return float(bowl - 10 * depth @ np.cos(2 * np.pi * theta) + 10 * len(theta))


def rosenbrock(theta: np.ndarray, steepness: np.ndarray) -> float:
    return sum(float(steepness * (y - x * x) ** 2 + (1 - x) ** 2) for x, y in pairwise(theta))


def ill_conditioned(theta: np.ndarray, root: np.ndarray, minimum: np.ndarray) -> float:
    offset = theta - minimum
    return float(0.5 * offset @ (root.T @ root) @ offset)


@pytest.mark.parametrize(
    ("family", "formula"),
    [
        (PiecewiseSquare(dimension=4), piecewise_square),
        (Lasso(equations=3, dimension=4), lasso),
        (Rastrigin(dimension=4), rastrigin),
        (Rosenbrock(dimension=4, steepnesses=(1.0, 100.0)), rosenbrock),
        (IllConditioned(dimensions=(4, 4), conditions=(1.0, 1000.0)), ill_conditioned),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, TaskFamily) else "",
)
@given(theta=st.lists(st.floats(-5, 5), min_size=4, max_size=4), seed=seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_loss_is_the_stated_formula(
    family: TaskFamily, formula: Callable[..., float], theta: list[float], seed: int
) -> None:
    task = family.draw(seeded(seed), COPIES)
    for copy in range(COPIES):
        point = np.array(theta)
        assert value(task, point, copy) == pytest.approx(formula(point, *problem(task, copy)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("family", [PiecewiseSquare(), Lasso(), Rastrigin(), Rosenbrock(), IllConditioned()])
def test_every_split_is_the_function_itself(family: TaskFamily) -> None:
    task = family.draw(seeded(), COPIES)
    for split in ("train", "validation", "test"):
        first, second = task.sample(seeded(1), "train"), task.sample(seeded(2), split)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_piecewise_square_is_as_in_the_paper() -> None:
    task = PiecewiseSquare().draw(seeded(), COPIES)
    assert task.init(seeded())["theta"].shape == (COPIES, 20) and task.init(seeded())["theta"].eq(0).all()
    (center,) = task.sample(seeded())
    assert -1 <= center.min() < -0.8 and 0.8 < center.max() <= 1
    far = at(center[0] + torch.tensor([100.0] + [1.0] * 19))
    gradient = grad(task.loss)(far, (center[0],))["theta"]
    assert gradient[0] == 0  # beyond the ceiling nothing leads back
    torch.testing.assert_close(gradient[1:], torch.full((19,), 2 / 20))


def test_random_scaling_of_a_piecewise_square_keeps_its_start() -> None:
    family = Reparametrized(PiecewiseSquare(), (1.0, 1.0), (math.exp(-1), math.exp(1)))
    task = family.draw(seeded(), COPIES)
    scale = task.scales["theta"]
    assert math.exp(-1) <= scale.min() < 0.45 and 2.2 < scale.max() <= math.exp(1)
    scaled, _, center = torch.randn(COPIES, 20, generator=seeded()), *task.sample(seeded())
    losses = vmap(task.loss)(at(scaled), task.sample(seeded()))
    torch.testing.assert_close(losses, (scaled * scale - center).square().clamp(max=10).mean(1))


def test_lasso_at_its_solution_satisfies_the_optimality_conditions() -> None:
    task = Lasso(penalty=0.3).draw(seeded(), 1)
    matrix, target = problem(task)
    step, theta = 1 / np.linalg.norm(matrix, 2) ** 2, np.zeros(10)
    for _ in range(5000):  # proximal gradient descent
        moved = theta - step * matrix.T @ (matrix @ theta - target)
        theta = np.sign(moved) * np.maximum(np.abs(moved) - 0.3 * step, 0)
    assert 0 < (theta == 0).sum() < 10
    best = value(task, theta)
    generator = np.random.default_rng(0)
    assert all(value(task, theta + 0.1 * generator.normal(size=10)) > best for _ in range(50))


def test_rastrigin_has_minima_about_one_apart() -> None:
    identity = (torch.eye(1), torch.zeros(1), torch.ones(1))
    task = Rastrigin(dimension=1).draw(seeded(), 1)
    line = torch.linspace(-2.5, 2.5, 1001)[:, None]
    values = vmap(task.loss, in_dims=(0, None))(at(line), identity)
    inner = values[1:-1]
    minima = line[1:-1, 0][(inner < values[:-2]) & (inner < values[2:])]
    torch.testing.assert_close(minima, torch.arange(-2.0, 3.0), rtol=0, atol=0.02)


def test_rosenbrock_is_least_where_every_coordinate_is_one() -> None:
    task = Rosenbrock(dimension=5).draw(seeded(), 1)
    assert task.sample(seeded())[0].tolist() == pytest.approx([100.0])
    gradient = grad(task.loss)(at(torch.ones(5)), (torch.tensor(100.0),))["theta"]
    assert value(task, np.ones(5)) == 0 and gradient.eq(0).all()


@given(seed=seeds, decades=st.floats(0, 6), dimension=st.integers(2, 30))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_an_ill_conditioned_quadratic_has_the_drawn_condition_number(seed: int, decades: float, dimension: int) -> None:
    family = IllConditioned((dimension, dimension), conditions=(10**decades, 10**decades))
    task = family.draw(seeded(seed), COPIES)
    assert task.condition == pytest.approx(10**decades)
    roots, minimum = task.sample(seeded())
    curvatures = torch.linalg.svdvals(roots.double()).square()
    torch.testing.assert_close(curvatures[:, 0], torch.ones(COPIES).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(curvatures[:, -1], torch.full((COPIES,), 10.0**-decades).double(), rtol=1e-3, atol=0)
    losses = vmap(task.loss)(at(minimum), (roots, minimum))
    assert losses.eq(0).all()


def test_curvatures_spread_evenly_on_a_logarithmic_scale() -> None:
    task = IllConditioned((200, 200), conditions=(1e4, 1e4)).draw(seeded(), COPIES)
    exponents = torch.linalg.svdvals(task.problem[0].double()).square().log10() / -4
    counts = torch.histc(exponents, 4, 0, 1) / exponents.numel()
    assert (counts - 0.25).abs().max() < 0.06


@given(seed=seeds, dimension=st.integers(1, 12))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_rotations_are_orthogonal(seed: int, dimension: int) -> None:
    q = rotation(seeded(seed), COPIES, dimension)
    torch.testing.assert_close(q @ q.mT, torch.eye(dimension).expand(COPIES, -1, -1), rtol=0, atol=1e-5)


def test_rotations_have_no_preferred_direction() -> None:
    q = rotation(seeded(), 4000, 3)
    # Of a uniformly random orthogonal matrix every entry has mean 0 and variance 1/3, and both determinants occur.
    assert q.mean(0).abs().max() < 0.04 and (q.square().mean(0) - 1 / 3).abs().max() < 0.03
    assert 0.45 < (torch.linalg.det(q) > 0).float().mean() < 0.55


def test_sinusoids_are_those_of_the_paper() -> None:
    task = Sinusoid(batch_sizes=(100, 100)).draw(seeded(), 500)
    x, y = task.sample(seeded())
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    torch.testing.assert_close(y, task.amplitude * torch.sin(x - task.phase))
    assert 0.1 <= task.amplitude.min() < 0.2 and 4.9 < task.amplitude.max() <= 5
    assert 0 <= task.phase.min() < 0.1 and 3.0 < task.phase.max() <= math.pi
    assert {key: tuple(tensor.shape[1:]) for key, tensor in task.init(seeded()).items()} == {
        "0.weight": (1, 40),
        "0.bias": (40,),
        "1.weight": (40, 40),
        "1.bias": (40,),
        "2.weight": (40, 1),
        "2.bias": (1,),
    }


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (lambda: PiecewiseSquare(dimension=0), "dimension must be at least 1"),
        (lambda: PiecewiseSquare(ceiling=0.0), "ceiling must be positive"),
        (lambda: Lasso(equations=0), "equations must be at least 1"),
        (lambda: Lasso(penalty=-1.0), "penalty must not be negative"),
        (lambda: Rastrigin(dimension=0), "dimension must be at least 1"),
        (lambda: Rosenbrock(dimension=1), "dimension must be at least 2"),
        (lambda: Rosenbrock(steepnesses=(0.0, 1.0)).draw(seeded(), 1), "must be positive"),
        (lambda: IllConditioned(dimensions=(1, 5)), "dimensions must be at least 2"),
        (lambda: IllConditioned(conditions=(0.5, 2.0)), "conditions at least 1"),
        (lambda: Sinusoid(activations=("sine",)), "unknown activation 'sine'"),
    ],
)
def test_impossible_functions_are_refused(family: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family()
