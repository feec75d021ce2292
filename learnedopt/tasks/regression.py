"""Regression on the outputs of a random network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, integer, log_integer, log_uniform
from learnedopt.tasks.layers import ACTIVATIONS, COMMON_ACTIVATIONS, init_mlp, mlp, weight


@dataclass(frozen=True, eq=False)
class RegressionTask(Task):
    """Mean squared error of an MLP against a tanh network of two layers, its outputs blurred by Gaussian noise.

    Each copy has a teacher of its own. Examples never repeat, so the splits are equally distributed.
    """

    copies: int
    sizes: tuple[int, ...]
    activation: str
    gain: float
    noise: float
    batch_size: int
    teacher: tuple[Tensor, Tensor] = field(repr=False)

    def init(self, generator: Generator) -> Params:
        return init_mlp(generator, self.copies, self.sizes, self.gain)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        x = torch.randn(self.copies, self.batch_size, self.sizes[0], generator=generator)
        y = torch.tanh(x @ self.teacher[0]) @ self.teacher[1]
        return x, y + self.noise * torch.randn(y.shape, generator=generator)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(mlp(params, x, self.activation), y)


@dataclass(frozen=True)
class Regression(TaskFamily):
    """Random teachers, random students.

    >>> task = Regression().draw(torch.Generator().manual_seed(0), copies=2)
    >>> x, y = task.sample(torch.Generator().manual_seed(0))
    >>> x.shape[0], y.shape[0]
    (2, 2)
    """

    inputs: IntRange = (2, 32)
    outputs: IntRange = (1, 4)
    teacher_widths: IntRange = (4, 32)
    teacher_gains: Range = (0.5, 3.0)
    noises: tuple[float, ...] = (0.0, 0.1, 0.5)
    depths: IntRange = (1, 3)
    widths: IntRange = (8, 32)
    activations: tuple[str, ...] = COMMON_ACTIVATIONS
    gains: Range = (0.5, 2.0)
    batch_sizes: IntRange = (8, 64)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)

    def draw(self, generator: Generator, copies: int) -> RegressionTask:
        inputs, outputs = log_integer(generator, self.inputs), integer(generator, self.outputs)
        hidden = log_integer(generator, self.teacher_widths)
        gain = log_uniform(generator, self.teacher_gains)
        teacher = (
            weight(generator, copies, inputs, hidden, fan_in=inputs, gain=gain),
            weight(generator, copies, hidden, outputs, fan_in=hidden, gain=2.0),
        )
        width = log_integer(generator, self.widths)
        return RegressionTask(
            copies=copies,
            sizes=(inputs, *[width] * integer(generator, self.depths), outputs),
            activation=choice(generator, self.activations),
            gain=log_uniform(generator, self.gains),
            noise=choice(generator, self.noises),
            batch_size=log_integer(generator, self.batch_sizes),
            teacher=teacher,
        )
