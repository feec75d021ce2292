"""Unrolls have the right values and the right derivatives, and are what the optimizer does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.meta import Episode, start_episode, unroll
from learnedopt.rules import UpdateRule
from learnedopt.tasks import Batch
from tests.meta.support import FAMILIES, KINDS, random_rule

each_kind = pytest.mark.parametrize("kind", KINDS)
each_family = pytest.mark.parametrize("family", FAMILIES)

STEPS = 4


def start(rule: UpdateRule, family: str, copies: int = 2, seed: int = 0) -> tuple[Episode, Generator]:
    generator = Generator().manual_seed(seed)
    return start_episode(rule, FAMILIES[family].draw(generator, copies), generator), generator


def batches_after(episode: Episode, generator: Generator) -> list[Batch]:
    """The batches that an unroll with this generator will draw; the generator itself is not advanced."""
    twin = Generator()
    twin.set_state(generator.get_state())
    return [episode.flat.task.sample(twin) for _ in range(STEPS)]


def replay(rule: UpdateRule, episode: Episode, batches: list[Batch], inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Losses of an unroll whose rule is fed the given gradients and losses, whatever those at its parameters are."""
    theta, state, losses = episode.theta, episode.state, []
    for (grad, loss), batch in zip(inputs, batches):
        delta, state = rule.update(theta.flatten(), grad.flatten(), state, episode.flat.segments, loss)
        theta = theta + delta.view_as(theta)
        losses.append(episode.flat.loss(theta, batch))
    return torch.stack(losses)


def finite_differences(rule: UpdateRule, meta_loss: Callable[[], Tensor], step: float = 1e-6) -> list[Tensor]:
    """Central differences of the meta-loss along a few random directions, one per direction."""
    generator, slopes = Generator().manual_seed(1), []
    weights = list(rule.parameters())
    for direction in directions(rule, generator):
        values = []
        for sign in (1.0, -2.0):
            with torch.no_grad():
                for weight, change in zip(weights, direction):
                    weight.add_(change, alpha=sign * step)
                values.append(meta_loss())
        with torch.no_grad():
            for weight, change in zip(weights, direction):
                weight.add_(change, alpha=step)
        slopes.append((values[0] - values[1]) / (2 * step))
    return slopes


def directions(rule: UpdateRule, generator: Generator) -> list[list[Tensor]]:
    """One direction within each meta-parameter tensor, so that an error in any is seen, and one through all."""
    weights = list(rule.parameters())
    full = [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights]
    alone = [
        [change if i == j else torch.zeros_like(change) for j, change in enumerate(full)] for i in range(len(full))
    ]
    return [*alone, full]


def analytic(rule: UpdateRule, meta_loss: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(meta_loss, list(rule.parameters()))
    return [
        torch.stack([(grad * change).sum() for grad, change in zip(grads, direction)]).sum()
        for direction in directions(rule, Generator().manual_seed(1))
    ]


@each_kind
@each_family
def test_first_order_meta_gradients_hold_the_gradients_fixed(kind: str, family: str) -> None:
    rule = random_rule(kind)
    episode, generator = start(rule, family)
    batches = batches_after(episode, generator)
    losses, _ = unroll(rule, episode, STEPS, generator)

    inputs, (theta, state) = [(episode.grad, episode.loss)], (episode.theta, episode.state)
    with torch.no_grad():
        for batch in batches:
            grad, loss = inputs[-1]
            delta, state = rule.update(theta.flatten(), grad.flatten(), state, episode.flat.segments, loss)
            theta = theta + delta.view_as(theta)
            loss, grad = episode.flat.loss_and_grad(theta, batch)
            inputs.append((grad, loss))

    torch.testing.assert_close(losses, replay(rule, episode, batches, inputs), rtol=1e-12, atol=1e-12)
    slopes = analytic(rule, losses.mean())
    expected = finite_differences(rule, lambda: replay(rule, episode, batches, inputs).mean())
    torch.testing.assert_close(slopes, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "in_eigenbases"])  # its bases are constants
@each_family
def test_second_order_meta_gradients_are_the_full_derivative(kind: str, family: str) -> None:
    rule = random_rule(kind)
    episode, generator = start(rule, family)
    before = generator.get_state()

    def meta_loss() -> Tensor:
        generator.set_state(before)
        losses, _ = unroll(rule, episode, STEPS, generator, second_order=True)
        return losses.mean()

    slopes = analytic(rule, meta_loss())
    generator.set_state(before)
    first_order, _ = unroll(rule, episode, STEPS, generator)
    assert not torch.allclose(torch.stack(analytic(rule, first_order.mean())), torch.stack(slopes), rtol=1e-4)
    torch.testing.assert_close(slopes, finite_differences(rule, meta_loss), rtol=1e-5, atol=1e-8)


@each_kind
@each_family
@pytest.mark.parametrize("second_order", [False, True])
def test_two_windows_are_one_unroll(kind: str, family: str, second_order: bool) -> None:
    rule = random_rule(kind)
    episode, generator = start(rule, family)
    before = generator.get_state()
    whole, end = unroll(rule, episode, 6, generator, second_order)

    generator.set_state(before)
    first, middle = unroll(rule, episode, 2, generator, second_order)
    second, last = unroll(rule, middle, 4, generator, second_order)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(last.theta, end.theta)
    assert torch.equal(last.grad, end.grad)
    assert all(torch.equal(last.state[name], end.state[name]) for name in end.state)
    assert (middle.step, last.step, end.step) == (2, 6, 6)


@each_kind
@pytest.mark.parametrize("second_order", [False, True])
def test_nothing_of_a_window_reaches_the_next(kind: str, second_order: bool) -> None:
    rule = random_rule(kind)
    episode, generator = start(rule, "mlp")
    theta = episode.theta.clone()
    losses, after = unroll(rule, episode, 2, generator, second_order)
    assert losses.requires_grad
    carried = [after.theta, after.loss, after.grad, after.initial_loss, *after.state.values()]
    assert not any(tensor.requires_grad for tensor in carried)
    assert torch.equal(episode.theta, theta)
    assert after.initial_loss is episode.initial_loss


@each_kind
@pytest.mark.parametrize("second_order", [False, True])
def test_without_gradients_an_unroll_keeps_no_graph_and_gives_the_same_losses(kind: str, second_order: bool) -> None:
    rule = random_rule(kind)
    episode, generator = start(rule, "mlp")
    before = generator.get_state()
    expected, _ = unroll(rule, episode, 3, generator, second_order)
    generator.set_state(before)
    with torch.no_grad():
        losses, _ = unroll(rule, episode, 3, generator, second_order)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)


@each_kind
@each_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
def test_the_optimizer_walks_the_path_of_the_unroll(
    kind: str, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    if kind == "in_eigenbases":
        # Single products are rounded otherwise than batched ones. Where two rows have had the same gradients, as two
        # pixels of small images can, that decides which of them comes first in the bases, and later steps tell.
        tolerance = max(1e3 * tolerance, 1e-3)
    rule = random_rule(kind, dtype)
    episode, generator = start(rule, family, copies=1)
    flat, task = episode.flat, episode.flat.task

    draws = Generator().manual_seed(0)
    FAMILIES[family].draw(draws, 1)
    params = {name: nn.Parameter(value[0].to(dtype)) for name, value in task.init(draws).items()}
    batches = [task.sample(draws), *batches_after(episode, generator)]
    optimizer = LearnedOptimizer(params.values(), rule=rule)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = task.loss(dict(params), tuple(x[0].to(dtype) if x.is_floating_point() else x[0] for x in batch))
        loss.backward()
        losses.append(loss.detach())
        if len(losses) <= STEPS:
            optimizer.step(loss=loss)

    unrolled, after = unroll(rule, episode, STEPS, generator)
    torch.testing.assert_close(torch.stack(losses[1:]), unrolled[:, 0].detach(), rtol=tolerance, atol=tolerance)
    for name, value in flat.unflatten(after.theta).items():
        torch.testing.assert_close(params[name].detach(), value[0], rtol=tolerance, atol=tolerance)


@each_kind
@each_family
def test_copies_do_not_know_of_each_other(kind: str, family: str) -> None:
    rule = random_rule(kind)
    episode, generator = start(rule, family, copies=3)
    before = generator.get_state()
    losses, after = unroll(rule, episode, STEPS, generator)
    other = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    elsewhere = replace(
        episode, theta=episode.theta + other, grad=episode.grad + other, loss=episode.loss + other[:, 0]
    )
    generator.set_state(before)
    moved, after_moved = unroll(rule, elsewhere, STEPS, generator)
    assert not torch.allclose(moved[:, 1], losses[:, 1])
    torch.testing.assert_close(moved[:, [0, 2]], losses[:, [0, 2]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after_moved.theta[[0, 2]], after.theta[[0, 2]], rtol=1e-12, atol=1e-12)


def test_parameters_come_back_from_the_flat_matrix_with_their_names_and_shapes() -> None:
    generator = Generator().manual_seed(0)
    task = FAMILIES["mlp"].draw(generator, 2)
    params = task.init(generator)
    episode = start_episode(random_rule("lstm"), task, generator)
    back = episode.flat.unflatten(episode.flat.flatten(params))
    assert list(back) == list(params)
    assert all(torch.equal(back[name], params[name]) for name in params)
