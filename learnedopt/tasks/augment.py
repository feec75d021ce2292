"""Families made of other families: mixed, rescaled, reparametrized, with other batches, in other precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, log_integer, log_uniform, log_uniform_tensor


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
class WrappedTask(Task):
    """Another task, changed in one respect; as it stands, in none."""

    task: Task

    @property
    def copies(self) -> int:  # type: ignore[override]
        return self.task.copies

    def init(self, generator: Generator) -> Params:
        return self.task.init(generator)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return self.task.sample(generator, split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.task.loss(params, batch)

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        return self.task.accuracy(params, batch)


@dataclass(frozen=True, eq=False)
class ScaledTask(WrappedTask):
    """``scale`` times the loss of another task."""

    scale: float

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.scale * self.task.loss(params, batch)


@dataclass(frozen=True)
class ScaledLoss(TaskFamily):
    """Multiplies the loss by a constant, log-uniform in ``scales`` and drawn with the structure."""

    family: TaskFamily
    scales: Range = (0.1, 10.0)

    def draw(self, generator: Generator, copies: int) -> ScaledTask:
        return ScaledTask(self.family.draw(generator, copies), log_uniform(generator, self.scales))


@dataclass(frozen=True, eq=False)
class ReparametrizedTask(WrappedTask):
    """Another task in the variable ``φ = θ / s``: its loss at ``θ = φ · s``.

    The scales ``s`` differ from copy to copy, so they travel at the front of the batch, one tensor per parameter.
    """

    scales: Params = field(repr=False)

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

    A rule meta-trained on the reparametrized tasks cannot learn one particular scale of the parameters by heart. The
    random scaling of Lv et al., *Learning Gradient Descent: Better Generalization and Longer Horizons*, 2017
    (arXiv:1703.03633, section 4.1), is ``tensor_scales=(1, 1)`` and ``coordinate_scales=(exp(-r), exp(r))``: each
    coordinate times exp U(-r, r).

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


@dataclass(frozen=True)
class RandomBatchSize(TaskFamily):
    """Gives another family's tasks a batch size of its own choice, log-uniform in ``batch_sizes``.

    It reaches through tasks that wrap others. A task without minibatches, a quadratic say, stays as it is.

    >>> from learnedopt.tasks.mlp import MLPClassification
    >>> family = RandomBatchSize(MLPClassification(), batch_sizes=(5, 5))
    >>> family.draw(torch.Generator().manual_seed(0), copies=2)
    MLP(digits, hidden=20, sigmoid, batch_size=5)
    """

    family: TaskFamily
    batch_sizes: IntRange = (4, 256)

    def draw(self, generator: Generator, copies: int) -> Task:
        return _with_batch_size(self.family.draw(generator, copies), log_integer(generator, self.batch_sizes))


def _with_batch_size(task: Task, size: int) -> Task:
    if isinstance(task, WrappedTask):
        return replace(task, task=_with_batch_size(task.task, size))
    if is_dataclass(task) and "batch_size" in (own.name for own in fields(task)):
        return replace(task, batch_size=size)
    return task


Precision = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class LowPrecisionTask(WrappedTask):
    """Another task, its loss and gradients computed in ``precision`` from parameters and batches rounded to it.

    Parameters, loss and gradients go in and come out as they are: an optimizer sees full-precision numbers that carry
    the errors of low precision.
    """

    precision: Precision

    def loss(self, params: Params, batch: Batch) -> Tensor:
        like = next(iter(params.values()))
        return self.task.loss(*self._rounded(params, batch)).to(like.dtype)

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        return self.task.accuracy(*self._rounded(params, batch))

    def _rounded(self, params: Params, batch: Batch) -> tuple[Params, Batch]:
        dtype = _DTYPES[self.precision]
        rounded = tuple(item.to(dtype) if item.is_floating_point() else item for item in batch)
        return {name: value.to(dtype) for name, value in params.items()}, rounded


@dataclass(frozen=True)
class LowPrecision(TaskFamily):
    """Evaluates another family's tasks in a precision drawn from ``precisions``, without scaling of the loss.

    In ``"float16"`` losses above 65,504 overflow and gradients below 6e-8 vanish, which scaled problems reach soon;
    ``"bfloat16"`` keeps the range of single precision and has three significant digits. Raises ``ValueError`` for an
    unknown precision.

    >>> from learnedopt.tasks.quadratic import Quadratics
    >>> task = LowPrecision(Quadratics()).draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.precision
    'bfloat16'
    """

    family: TaskFamily
    precisions: tuple[Precision, ...] = ("bfloat16",)

    def __post_init__(self) -> None:
        check_known("precision", self.precisions, _DTYPES)

    def draw(self, generator: Generator, copies: int) -> LowPrecisionTask:
        return LowPrecisionTask(self.family.draw(generator, copies), choice(generator, self.precisions))
