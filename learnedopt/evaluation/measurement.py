"""What one contender does on one task: many settings on many copies, in one vectorized run; and what a step costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from learnedopt.evaluation.contenders import Contender, Fleet, Setting
from learnedopt.meta.unroll import FlatTask
from learnedopt.tasks import Task, TaskFamily
from learnedopt.tasks.base import Batch, Params, Split

DIVERGED = 1000.0
"""A loss above this multiple of the initial one counts as diverged."""
DECAY = 0.95
"""Per step, of the exponential average that training losses are smoothed by."""
BATCHES = 4
"""How many fixed batches of a split make a measurement."""


@dataclass(frozen=True)
class Problems:
    """Copies of a task. All contenders and settings meet the same starting points and batches: runs are paired."""

    family: TaskFamily
    seed: int
    copies: int
    shared: bool = True
    """Whether the copies' data are the same, so that one set of batches can be measured on by all copies, whatever the
    seed. Otherwise each copy has its own."""


@dataclass(frozen=True)
class Measurements:
    """What the copies did under every setting."""

    at: tuple[int, ...]
    """The steps at which training losses were measured."""
    losses: np.ndarray
    """``(len(at), settings, copies)``: smoothed training losses, infinite from where a copy diverged."""
    held_out_at: tuple[int, ...]
    held_out: np.ndarray
    """``(len(held_out_at), settings, copies)``: losses on the validation split, not smoothed."""
    accuracy: np.ndarray | None
    """As ``held_out``, where the task classifies; zero from where a copy diverged."""
    diverged: np.ndarray
    """``(settings, copies)``: the step at which a copy diverged, -1 if it did not."""
    parameters: int
    """Of one copy."""


def smooth(losses: np.ndarray, decay: float) -> np.ndarray:
    r"""Exponential average over the first axis, corrected for its start: infinite from an infinite loss on.

    .. math:: s_t = \frac{\sum_{k \le t} \beta^{t-k} \ell_k}{\sum_{k \le t} \beta^{t-k}}

    >>> smooth(np.array([1.0, 0.0]), decay=0.5)
    array([1.        , 0.33333333])
    """
    out, total, weight = np.empty_like(losses), np.zeros(losses.shape[1:]), 0.0
    for step, loss in enumerate(losses):
        total, weight = decay * total + loss, decay * weight + 1
        out[step] = total / weight
    return out


def train(
    problems: Problems,
    contender: Contender,
    settings: Sequence[Setting],
    steps: int,
    *,
    every: int = 10,
    held_out_at: Iterable[int] = (),
) -> Measurements:
    """Train every copy of a task under every setting for ``steps`` steps.

    Losses are measured on :data:`BATCHES` batches of each split that stay the same from step to step, which leaves out
    the noise of minibatches; training losses are then smoothed by :func:`smooth` with ``DECAY ** every``. Where a
    contender averages its iterates, the average is measured.

    A copy whose loss on a training batch is not finite, or exceeds :data:`DIVERGED` times its
    first one, has diverged: its losses are infinite from there on, whatever it does later.

    Args:
        every: Steps between measurements of the training loss; the last step is measured in any case.
        held_out_at: The steps, among these, at which the loss on the validation split is measured too; if any are
            given, also the last.
    """
    family, copies = problems.family, problems.copies
    generator = Generator().manual_seed(problems.seed)
    task = family.draw(generator, copies)
    params = task.init(generator)
    flat = FlatTask(task, params)
    start = flat.flatten(params)
    theta = start.expand(len(settings), *start.shape).clone()
    fleet = Fleet(contender, settings, theta, params)

    probed = family.draw(Generator().manual_seed(problems.seed), 1) if problems.shared else task
    chosen = tuple(held_out_at)
    training = _Probe(probed, flat, "train", range(0, steps + 1, every), steps, copies)
    held_out = _Probe(probed, flat, "validation", chosen, steps, copies)
    diverged = torch.full((len(settings), copies), -1)
    first: Tensor | None = None
    for step in range(steps + 1):
        if step in training.at:
            fleet.eval()
            training.measure(theta, diverged)
            if chosen and step in held_out.at:
                held_out.measure(theta, diverged, classes=True)
            fleet.train()
        if step == steps:
            break
        batch = task.sample(generator)
        point = theta.detach().requires_grad_()
        loss = _over_copies(lambda vector, item: task.loss(flat.unflatten(vector), item), point, batch)
        (grad,) = torch.autograd.grad(loss.sum(), point)
        loss = loss.detach()
        first = loss.abs() if first is None else first
        diverged[(diverged < 0) & ~(loss <= DIVERGED * first)] = step
        fleet.step(grad, loss, step, steps)
    return Measurements(
        at=training.at,
        losses=smooth(np.stack(training.losses), DECAY**every),
        held_out_at=held_out.at if chosen else (),
        held_out=np.array(held_out.losses),
        accuracy=np.stack(held_out.accuracies) if held_out.accuracies else None,
        diverged=diverged.numpy(),
        parameters=theta.shape[-1],
    )


@dataclass(frozen=True)
class Cost:
    """Milliseconds of processor time per training step of one copy, on one thread."""

    gradient: float
    optimizer: float


_WARMUP, _PERIOD, _PERIODS = 10, 10, 5


def step_cost(family: TaskFamily, contender: Contender) -> Cost:
    """What a step costs one who trains one model: the gradient, and ``optimizer.step()`` on its tensors.

    Ten steps are not counted; then come five times ten, and of their means the median: some optimizers do at every
    tenth step what a median of single steps would leave out.
    """
    generator = Generator().manual_seed(0)
    task = family.draw(generator, 1)
    params = {name: value[0].clone().requires_grad_() for name, value in task.init(generator).items()}
    if contender.layout == "stacked":
        stacked = {name: value.detach()[None, None] for name, value in params.items()}
        optimizer = contender.make(stacked, [contender.default])
    else:
        stacked = {}
        optimizer = contender.make(list(params.values()), contender.default)
    if contender.averages:
        optimizer.train()  # type: ignore[attr-defined]
    seconds = np.empty((_WARMUP + _PERIODS * _PERIOD, 2))
    for step in range(len(seconds)):
        batch = tuple(item[0] for item in task.sample(generator))
        begin = time.process_time()
        loss = task.loss(params, batch)
        for value, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values()))):
            value.grad = grad
        middle = time.process_time()
        for name, leaf in stacked.items():
            leaf.grad = params[name].grad[None, None]  # type: ignore[index]
        if hasattr(optimizer, "observe"):
            optimizer.observe(loss)
        optimizer.step()
        seconds[step] = middle - begin, time.process_time() - middle
    means = seconds[_WARMUP:].reshape(_PERIODS, _PERIOD, 2).mean(1)
    gradient, own = 1000 * np.median(means, axis=0)
    return Cost(float(gradient), float(own))


def _over_copies(function: Callable[[Tensor, Batch], Tensor], theta: Tensor, batch: Batch) -> Tensor:
    """``(settings, copies)`` from parameters ``(settings, copies, n)``; the settings share the copies' batches."""
    return torch.func.vmap(torch.func.vmap(function), in_dims=(0, None))(theta, batch)


class _Probe:
    """Fixed batches of a split, and what was measured on them; those of a task with one copy serve all copies."""

    def __init__(self, task: Task, flat: FlatTask, split: Split, at: Iterable[int], steps: int, copies: int) -> None:
        self.at = tuple(sorted({*at, steps}))
        self.losses: list[np.ndarray] = []
        self.accuracies: list[np.ndarray] = []
        self._task, self._flat = task, flat
        generator = Generator().manual_seed(0)
        batches = [task.sample(generator, split) for _ in range(BATCHES)]
        self._batches = [tuple(item.expand(copies, *item.shape[1:]) for item in batch) for batch in batches]

    @torch.no_grad()
    def measure(self, theta: Tensor, diverged: Tensor, classes: bool = False) -> None:
        failed = (diverged >= 0).numpy()
        losses = self._mean(self._task.loss, theta)
        self.losses.append(np.where(failed | ~np.isfinite(losses), np.inf, losses))
        if classes:
            try:
                shares = self._mean(self._task.accuracy, theta)
            except NotImplementedError:
                return
            self.accuracies.append(np.where(failed, 0.0, shares))

    def _mean(self, function: Callable[[Params, Batch], Tensor], theta: Tensor) -> np.ndarray:
        values = [
            _over_copies(lambda vector, item: function(self._flat.unflatten(vector), item), theta, batch)
            for batch in self._batches
        ]
        return torch.stack(values).double().mean(0).numpy()
