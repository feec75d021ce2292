"""Running a rule on a batch of optimizees, in a way that can be differentiated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from learnedopt.rules import Segments, State, UpdateRule
from learnedopt.tasks.base import Batch, Params, Split, Task


class Updates(Protocol):
    """What an unroll asks of a rule."""

    def update(
        self, param: Tensor, grad: Tensor, state: State, segments: Segments, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As :meth:`learnedopt.rules.UpdateRule.update`."""


class FlatTask:
    """A task whose parameters are one matrix ``(copies, n)``: what rules and meta-gradients work on.

    Args:
        task: The task.
        params: Its parameters, for their names and shapes.
    """

    def __init__(self, task: Task, params: Params) -> None:
        self.task = task
        self._names = list(params)
        self._shapes = [tensor.shape[1:] for tensor in params.values()]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.segments = Segments(self._sizes, copies=task.copies, shapes=self._shapes)

    @staticmethod
    def flatten(params: Params) -> Tensor:
        """Parameters by name, each ``(copies, *shape)``, as one ``(copies, n)``."""
        return torch.cat([tensor.flatten(1) for tensor in params.values()], dim=1)

    def unflatten(self, theta: Tensor) -> Params:
        """Parameters by name from ``(..., n)``, each ``(..., *shape)``."""
        parts = theta.split(self._sizes, dim=-1)
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for name, shape, part in zip(self._names, self._shapes, parts)
        }

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """The losses of all copies, ``(copies,)``, differentiable in ``theta``.

        The batch follows the dtype and the device of ``theta``.
        """
        batch = tuple(_placed(item, theta) for item in batch)
        return torch.func.vmap(lambda flat, item: self.task.loss(self.unflatten(flat), item))(theta, batch)

    def loss_and_grad(self, theta: Tensor, batch: Batch, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Losses ``(copies,)`` and gradients ``(copies, n)`` at ``theta``.

        They are constants, unless ``create_graph``: then both can be differentiated with respect to ``theta``.
        """
        with torch.enable_grad():
            point = theta if create_graph and theta.requires_grad else theta.detach().requires_grad_()
            losses = self.loss(point, batch)
            (grad,) = torch.autograd.grad(losses.sum(), point, create_graph=create_graph)
        return (losses, grad) if create_graph else (losses.detach(), grad)


def _placed(item: Tensor, like: Tensor) -> Tensor:
    """``item`` on the device of ``like`` and, if it is of floating point, in its dtype; the host waits for nothing."""
    if like.is_cuda and not item.is_cuda:
        item = item.pin_memory()
    return item.to(like.device, like.dtype if item.is_floating_point() else None, non_blocking=True)


@dataclass
class Episode:
    """One task being optimized: where it stands between two windows. Nothing in it carries a graph."""

    flat: FlatTask
    theta: Tensor
    """Parameters, ``(copies, n)``."""
    state: State
    """The rule's state for all ``copies * n`` coordinates."""
    loss: Tensor
    """Losses at ``theta`` on the batch drawn there, ``(copies,)``."""
    grad: Tensor
    """Gradients at ``theta`` on that batch, ``(copies, n)``."""
    initial_loss: Tensor
    """Losses at the start of the episode, ``(copies,)``."""
    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What a gradient estimator carries from window to window."""


def start_episode(rule: UpdateRule, task: Task, generator: Generator) -> Episode:
    """Fresh parameters, a first batch, and the rule's empty state, in the dtype and on the device of the rule."""
    like = next(rule.parameters())
    params = task.init(generator)
    flat = FlatTask(task, params)
    theta = flat.flatten(params).to(like)
    loss, grad = flat.loss_and_grad(theta, task.sample(generator))
    state = rule.init_state(flat.segments, dtype=like.dtype, device=like.device, param=theta.flatten())
    return Episode(flat, theta, state, loss, grad, initial_loss=loss)


def unroll(
    rule: Updates,
    episode: Episode,
    steps: int,
    generator: Generator,
    second_order: bool = False,
    *,
    split: Split = "train",
    recompute: bool = False,
) -> tuple[Tensor, Episode]:
    r"""Take ``steps`` updates; return the losses after each and the episode there.

    Each update's loss is taken on the batch that the *next* update will train on, so one evaluation of the
    optimizee serves both: :math:`f_t = f(\theta_t; B_t)`, :math:`g_t = \nabla f(\theta_t; B_t)`,
    :math:`\theta_{t+1} = \theta_t + \Delta(g_t, \dots)`.

    Gradients entering the rule are constants, :math:`\partial g_t / \partial \phi := 0` (Andrychowicz et al. 2016,
    section 2.1), unless ``second_order``. In that first-order mode no graph through the optimizee is kept at all:
    since :math:`\partial f_t/\partial\theta_t` *is* :math:`g_t`, each returned loss is a constant plus
    :math:`\langle g_t, \theta_t \rangle - \text{its value}`, which has the right value and the right derivative.

    Args:
        rule: The rule; gradients flow to its parameters if grad mode is on.
        episode: Where to start; left as it is.
        steps: Number of updates.
        generator: Draws the batches.
        second_order: Differentiate through the optimizee's gradients too.
        split: Where the returned losses are taken. Other than ``"train"``, they are measured on batches of their own,
            which cost one more evaluation a step; training goes on from the training batches as ever.
        recompute: Keep the state of each step for the backward pass, and compute what lies between anew. The same
            numbers, for about a third less speed and a third of the memory.

    Returns:
        Losses ``(steps, copies)`` at :math:`\theta_1 \dots \theta_T`, and the new episode, detached.
    """
    flat, task = episode.flat, episode.flat.task
    theta, state, loss, grad = episode.theta, episode.state, episode.loss, episode.grad
    differentiable = torch.is_grad_enabled()
    second_order = second_order and differentiable
    losses, path, slopes = [], [], []
    for _ in range(steps):
        inputs = (theta.flatten(), grad.flatten(), state, flat.segments, loss)
        if recompute and differentiable:
            delta, state = checkpoint(rule.update, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            delta, state = rule.update(*inputs)
        theta = theta + delta.view_as(theta)
        loss, grad = flat.loss_and_grad(theta, task.sample(generator), create_graph=second_order)
        if split == "train":
            measured, slope = loss, grad
        else:
            measured, slope = flat.loss_and_grad(theta, task.sample(generator, split), create_graph=second_order)
        losses.append(measured)
        path.append(theta)
        slopes.append(slope)
    after = replace(
        episode,
        theta=theta.detach(),
        state={name: value.detach() for name, value in state.items()},
        loss=loss.detach(),
        grad=grad.detach(),
        step=episode.step + steps,
    )
    found = torch.stack(losses)
    if differentiable and not second_order:
        inner = (torch.stack(path) * torch.stack(slopes)).sum(-1)
        found = found + (inner - inner.detach())
    return found, after
