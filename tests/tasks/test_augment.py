"""Families made of other families."""

from __future__ import annotations

import pytest
import torch
from torch import Generator
from torch.func import grad, grad_and_value, vmap

from learnedopt.tasks.augment import (
    LowPrecision,
    Mixture,
    Precision,
    RandomBatchSize,
    Reparametrized,
    ReparametrizedTask,
    ScaledLoss,
)
from learnedopt.tasks.autoencoder import Autoencoder
from learnedopt.tasks.base import TaskFamily
from learnedopt.tasks.conv import Conv, ConvTask
from learnedopt.tasks.logistic import Logistic, LogisticTask
from learnedopt.tasks.quadratic import Quadratics
from learnedopt.tasks.regression import Regression, RegressionTask

COPIES = 4
FAMILIES = [Regression(), Autoencoder(), Logistic(), Conv()]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("coordinate_scales", [None, (0.3, 3.0)])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_reparametrized_task_starts_at_the_same_function(
    family: TaskFamily, coordinate_scales: tuple[float, float] | None
) -> None:
    plain = family.draw(seeded(), COPIES)
    other = Reparametrized(family, coordinate_scales=coordinate_scales).draw(seeded(), COPIES)
    params, batch = plain.init(seeded(1)), plain.sample(seeded(1))
    scaled, scaled_batch = other.init(seeded(1)), other.sample(seeded(1))
    torch.testing.assert_close(vmap(other.loss)(scaled, scaled_batch), vmap(plain.loss)(params, batch))
    # By the chain rule the gradient grows where the parameter shrank.
    gradient, scaled_gradient = vmap(grad(plain.loss))(params, batch), vmap(grad(other.loss))(scaled, scaled_batch)
    for name, scale in other.scales.items():
        torch.testing.assert_close(scaled_gradient[name], gradient[name] * scale, rtol=1e-3, atol=1e-5)


def test_scales_are_per_tensor_per_copy_and_within_their_range() -> None:
    task = Reparametrized(Conv(), tensor_scales=(0.5, 2.0)).draw(seeded(), COPIES)
    flat = torch.cat([scale.flatten() for scale in task.scales.values()])
    assert len(flat) == COPIES * len(task.scales) == len(flat.unique())
    assert 0.5 <= flat.min() < flat.max() <= 2.0


def test_coordinate_scales_differ_within_a_tensor() -> None:
    family = Reparametrized(Regression(), tensor_scales=(1.0, 1.0), coordinate_scales=(0.1, 10.0))
    task = family.draw(seeded(), COPIES)
    params = task.init(seeded())
    for name, scale in task.scales.items():
        assert scale.shape == params[name].shape
        assert 0.1 <= scale.min() < scale.max() <= 10.0


def test_scales_stay_the_same_from_batch_to_batch() -> None:
    task = Reparametrized(Regression()).draw(seeded(), COPIES)
    first, second = task.sample(seeded(1)), task.sample(seeded(2))
    count = len(task.scales)
    assert all(torch.equal(a, b) for a, b in zip(first[:count], second[:count], strict=True))
    assert not torch.equal(first[count], second[count])


def test_scaled_loss_is_the_loss_times_its_scale() -> None:
    plain = Logistic().draw(seeded(), COPIES)
    scaled = ScaledLoss(Logistic(), scales=(3.0, 3.0)).draw(seeded(), COPIES)
    params, batch = plain.init(seeded(1)), plain.sample(seeded(1))
    torch.testing.assert_close(vmap(scaled.loss)(params, batch), 3 * vmap(plain.loss)(params, batch))


def test_scales_of_the_loss_spread_over_their_range() -> None:
    scales = torch.tensor([ScaledLoss(Logistic()).draw(seeded(seed), 1).scale for seed in range(200)])
    assert 0.1 <= scales.min() < 0.2 and 5 < scales.max() <= 10
    assert 0.35 < scales.lt(1).float().mean() < 0.65


def test_wrapped_tasks_keep_their_accuracy() -> None:
    plain = Conv().draw(seeded(), COPIES)
    wrapped = Reparametrized(ScaledLoss(Conv())).draw(seeded(), COPIES)
    expected = vmap(plain.accuracy)(plain.init(seeded(1)), plain.sample(seeded(1), "test"))
    found = vmap(wrapped.accuracy)(wrapped.init(seeded(1)), wrapped.sample(seeded(1), "test"))
    torch.testing.assert_close(found, expected)
    assert wrapped.copies == COPIES and "ConvTask" in repr(wrapped)


def test_batch_sizes_are_drawn_anew_through_every_wrapper() -> None:
    family = RandomBatchSize(Reparametrized(ScaledLoss(Conv())), batch_sizes=(3, 9))
    sizes = set()
    for seed in range(40):
        task = family.draw(seeded(seed), COPIES)
        images, classes = task.sample(seeded(seed))[-2:]
        assert images.shape[1] == classes.shape[1]
        sizes.add(images.shape[1])
        assert isinstance(task, ReparametrizedTask)
    assert sizes == set(range(3, 10))


def test_tasks_without_minibatches_keep_what_they_have() -> None:
    plain, other = Quadratics().draw(seeded(), COPIES), RandomBatchSize(Quadratics()).draw(seeded(), COPIES)
    assert all(torch.equal(a, b) for a, b in zip(plain.sample(seeded()), other.sample(seeded()), strict=True))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_loss_and_gradients_carry_the_errors_of_low_precision(family: TaskFamily, precision: Precision) -> None:
    plain = family.draw(seeded(), COPIES)
    rough = LowPrecision(family, (precision,)).draw(seeded(), COPIES)
    params, batch = plain.init(seeded(1)), plain.sample(seeded(1))
    gradients, losses = vmap(grad_and_value(rough.loss))(params, batch)
    exact = vmap(grad(plain.loss))(params, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, vmap(plain.loss)(params, batch), rtol=0.05, atol=0.01)
    dtype = getattr(torch, precision)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradient.to(dtype).float())  # it has no more digits than that precision
        assert (gradient - exact[name]).norm() <= 0.1 * exact[name].norm() + 1e-3
    assert any(not torch.equal(gradients[name], exact[name]) for name in exact)


def test_single_precision_changes_nothing_and_every_precision_is_drawn() -> None:
    family = LowPrecision(Conv(), ("float32", "bfloat16", "float16"))
    drawn = {task.precision: task for task in (family.draw(seeded(seed), COPIES) for seed in range(20))}
    assert set(drawn) == {"float32", "bfloat16", "float16"}
    task = drawn["float32"]
    params, batch = task.init(seeded(1)), task.sample(seeded(1))
    torch.testing.assert_close(vmap(task.loss)(params, batch), vmap(task.task.loss)(params, batch), rtol=0, atol=0)
    assert vmap(drawn["bfloat16"].accuracy)(params, batch).shape == (COPIES,)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        LowPrecision(Conv(), ("fp8",))  # type: ignore[arg-type]


def test_mixture_draws_in_proportion_to_its_weights() -> None:
    mixture = Mixture((Regression(), Logistic(), Conv()), weights=(3.0, 1.0, 0.0))
    generator = seeded()
    kinds = [type(mixture.draw(generator, 1)) for _ in range(400)]
    assert set(kinds) == {RegressionTask, LogisticTask}
    assert 0.68 < kinds.count(RegressionTask) / len(kinds) < 0.82


def test_mixture_without_weights_draws_equally() -> None:
    mixture = Mixture((Regression(), Logistic(), Conv()))
    generator = seeded()
    kinds = [type(mixture.draw(generator, 1)) for _ in range(300)]
    assert all(70 < kinds.count(kind) < 130 for kind in (RegressionTask, LogisticTask, ConvTask))


@pytest.mark.parametrize(
    ("families", "weights", "message"),
    [
        ((), None, "at least one family"),
        ((Regression(), Logistic()), (1.0,), "as many weights, got 1"),
        ((Regression(), Logistic()), (0.0, 0.0), "not all zero"),
        ((Regression(), Logistic()), (2.0, -1.0), "not negative"),
        ((Regression(), Logistic()), (float("nan"), 1.0), "finite"),
    ],
)
def test_impossible_mixtures_are_refused(
    families: tuple[TaskFamily, ...], weights: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(families, weights)
