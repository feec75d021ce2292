"""Families made of other families: mixed, rescaled, reparametrised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import Range, log_uniform, log_uniform_tensor


@dataclass(frozen=True)
class Mixture(TaskFamily):
    """Draws from one of several families, chosen in proportion to ``weights`` (equally without them).

    Raises ``ValueError`` unless there is one finite weight per family, none negative and not all zero.
    """

    families: Sequence[TaskFamily]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.families:
            raise ValueError("a mixture needs at least one family")
        if self.weights is None:
            return
        if len(self.weights) != len(self.families):
            raise ValueError(f"{len(self.families)} families need as many weights, got {len(self.weights)}")
        weights = torch.tensor(self.weights, dtype=torch.float64)
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(f"weights must be finite, not negative and not all zero, got {tuple(self.weights)}")

    def draw(self, generator: Generator, copies: int) -> Task:
        weights = self.weights or [1.0] * len(self.families)
        which = torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator)
        return self.families[int(which)].draw(generator, copies)


@dataclass(frozen=True, eq=False)
class ScaledTask(Task):
    """``scale`` times the loss of another task."""

    task: Task
    scale: float

    @property
    def copies(self) -> int:  # type: ignore[override]
        return self.task.copies

    def init(self, generator: Generator) -> Params:
        return self.task.init(generator)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return self.task.sample(generator, split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.scale * self.task.loss(params, batch)

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        return self.task.accuracy(params, batch)


@dataclass(frozen=True)
class ScaledLoss(TaskFamily):
    """Multiplies the loss by a constant, log-uniform in ``scales`` and drawn with the structure."""

    family: TaskFamily
    scales: Range = (0.1, 10.0)

    def draw(self, generator: Generator, copies: int) -> ScaledTask:
        return ScaledTask(self.family.draw(generator, copies), log_uniform(generator, self.scales))


@dataclass(frozen=True, eq=False)
class ReparametrizedTask(Task):
    """Another task in the variable ``φ = θ / s``: its loss at ``θ = φ · s``.

    The scales ``s`` differ from copy to copy, so they travel at the front of the batch, one tensor per parameter.
    """

    task: Task
    scales: Params = field(repr=False)

    @property
    def copies(self) -> int:  # type: ignore[override]
        return self.task.copies

    def init(self, generator: Generator) -> Params:
        return {name: value / self.scales[name] for name, value in self.task.init(generator).items()}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return (*self.scales.values(), *self.task.sample(generator, split))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.task.loss(*self._original(params, batch))

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        return self.task.accuracy(*self._original(params, batch))

    def _original(self, params: Params, batch: Batch) -> tuple[Params, Batch]:
        scales = dict(zip(self.scales, batch))
        return {name: value * scales[name] for name, value in params.items()}, batch[len(scales) :]


@dataclass(frozen=True)
class Reparametrized(TaskFamily):
    """Gives each tensor a scale of its own, log-uniform in ``tensor_scales``, in each copy; with
    ``coordinate_scales`` each coordinate one more.

    A rule meta-trained on the reparametrised tasks cannot learn one particular scale of the parameters by heart
    (random scaling of Lv et al., *Learning Gradient Descent: Better Generalization and Longer Horizons*, 2017, §4.1).

    >>> from learnedopt.tasks.regression import Regression
    >>> task = Reparametrized(Regression()).draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.scales["0.bias"].shape
    torch.Size([2, 1])
    """

    family: TaskFamily
    tensor_scales: Range = (0.2, 5.0)
    coordinate_scales: Range | None = None

    def draw(self, generator: Generator, copies: int) -> ReparametrizedTask:
        task = self.family.draw(generator, copies)
        scales = {}
        for name, value in task.init(generator).items():
            shape = (copies, *[1] * (value.ndim - 1))
            scales[name] = log_uniform_tensor(generator, self.tensor_scales, shape)
            if self.coordinate_scales is not None:
                scales[name] = scales[name] * log_uniform_tensor(generator, self.coordinate_scales, value.shape)
        return ReparametrizedTask(task, scales)
