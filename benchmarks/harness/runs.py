"""Running optimizers on tasks: the loop a user would write, on many copies at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from learnedopt.evaluation import DIVERGED
from learnedopt.optim import LearnedOptimizer
from learnedopt.tasks import Params, Task, TaskFamily

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


@dataclass(frozen=True)
class Run:
    """What an optimizer did on every copy."""

    losses: Tensor
    """``(steps + 1, copies)``: at the starting point and after each step, on the batch drawn there."""
    params: Params
    """Where it ended, each ``(copies, *shape)``."""


def run(task: Task, make_optimizer: MakeOptimizer, steps: int, generator: Generator, *, stacked: bool = False) -> Run:
    r"""Train every copy of ``task`` for ``steps`` steps with ``optimizer.step()``.

    .. math:: \ell_t = f(\theta_t; B_t), \qquad \theta_{t+1} = \mathrm{step}(\theta_t, \nabla f(\theta_t; B_t))

    for :math:`t = 0 \dots T`; the last batch is only evaluated. Initialization and batches depend on the generator
    alone, so equal seeds give every optimizer the same problems, the same start and the same data: comparisons are
    paired.

    A copy whose loss is not finite, or exceeds :data:`~learnedopt.evaluation.DIVERGED` times its initial loss, has
    diverged: its loss is infinite from there on, whatever it does later. It stays in the result.

    Args:
        make_optimizer: Called with one copy's parameters, once per copy; or, if ``stacked``, once with all.
        stacked: Give one optimizer the parameters of all copies, each ``(copies, *shape)``. Faster, and exact for
            elementwise optimizers only (all of :data:`~benchmarks.harness.baselines.BASELINES`).

    >>> from benchmarks.harness.baselines import BASELINES
    >>> from learnedopt.tasks import Quadratics
    >>> generator = torch.Generator().manual_seed(0)
    >>> task = Quadratics().draw(generator, copies=2)
    >>> run(task, lambda params: BASELINES["adam"](params, lr=0.1), 10, generator).losses.shape
    torch.Size([11, 2])
    """
    start = task.init(generator)
    # The copies' losses are added up, so each copy's gradient is that of its own loss. An elementwise optimizer then
    # treats a coordinate the same way whichever tensor it sits in; one that looks at whole tensors (or at the loss)
    # must not see other copies, and gets each copy's tensors for itself.
    if stacked:
        shared = {name: value.requires_grad_() for name, value in start.items()}
        optimizers = [make_optimizer(list(shared.values()))]
    else:
        alone = [
            {name: value[copy].clone().requires_grad_() for name, value in start.items()} for copy in range(task.copies)
        ]
        optimizers = [make_optimizer(list(params.values())) for params in alone]

    def current() -> Params:
        return shared if stacked else {name: torch.stack([params[name] for params in alone]) for name in start}

    losses = torch.full((steps + 1, task.copies), torch.inf)
    diverged = torch.zeros(task.copies, dtype=torch.bool)
    for step in range(steps + 1):
        loss = torch.func.vmap(task.loss)(current(), task.sample(generator))
        losses[step] = loss.detach()
        diverged |= ~losses[step].isfinite() | (losses[step] > DIVERGED * losses[0].abs())
        losses[step, diverged] = torch.inf
        if step == steps or diverged.all():
            break
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.sum().backward()
        for optimizer, own_loss in zip(optimizers, loss):
            if isinstance(optimizer, LearnedOptimizer) and not stacked:
                optimizer.observe(own_loss)
            optimizer.step()
    return Run(losses, {name: value.detach() for name, value in current().items()})


def run_problems(
    family: TaskFamily,
    make_optimizer: MakeOptimizer,
    problems: int,
    steps: int,
    seed: int,
    *,
    chunk: int = 20,
    stacked: bool = False,
) -> Run:
    """:func:`run` on ``problems`` fresh problems of a family, ``chunk`` at a time.

    The problems depend on ``seed`` and ``chunk``: keep both to compare optimizers on the same ones. Every chunk is a
    draw of the family, so a family of several structures may give each chunk another. Different seeds give
    independent problems.
    """
    runs = []
    for index, first in enumerate(range(0, problems, chunk)):
        # A hash of both, so that no two seeds share a chunk.
        state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        task = family.draw(generator, min(chunk, problems - first))
        runs.append(run(task, make_optimizer, steps, generator, stacked=stacked))
    return Run(
        torch.cat([one.losses for one in runs], dim=1),
        {name: torch.cat([one.params[name] for one in runs]) for name in runs[0].params},
    )
