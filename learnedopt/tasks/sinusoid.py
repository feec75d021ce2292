"""Regression on sine waves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, log_integer, log_uniform, uniform_tensor
from learnedopt.tasks.layers import ACTIVATIONS, init_mlp, mlp


@dataclass(frozen=True, eq=False)
class SinusoidTask(Task):
    """Mean squared error of an MLP against ``amplitude * sin(x - phase)``, x uniform in [-5, 5].

    Each copy has an amplitude and a phase of its own. Examples never repeat, so the splits are equally distributed.
    """

    copies: int
    hidden: tuple[int, ...]
    activation: str
    gain: float
    batch_size: int
    amplitude: Tensor = field(repr=False)
    phase: Tensor = field(repr=False)

    def init(self, generator: Generator) -> Params:
        return init_mlp(generator, self.copies, (1, *self.hidden, 1), self.gain)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        x = 10 * torch.rand(self.copies, self.batch_size, 1, generator=generator) - 5
        return x, self.amplitude * torch.sin(x - self.phase)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(mlp(params, x, self.activation), y)


@dataclass(frozen=True)
class Sinusoid(TaskFamily):
    """The regression of Finn et al. 2017 (MAML, arXiv:1703.03400, section 5.1), without its few shots.

    Amplitudes uniform in [0.1, 5] and phases in [0, π]; the network there has two hidden layers of 40 ReLU units, and a
    batch ten examples. Initial weights have variance ``gain² / fan-in``, biases are zero.

    >>> task = Sinusoid().draw(torch.Generator().manual_seed(0), copies=2)
    >>> x, y = task.sample(torch.Generator().manual_seed(0))
    >>> bool((y.abs() <= task.amplitude).all())
    True
    """

    amplitudes: Range = (0.1, 5.0)
    phases: Range = (0.0, math.pi)
    hidden_sizes: tuple[tuple[int, ...], ...] = ((40, 40),)
    activations: tuple[str, ...] = ("relu",)
    gains: Range = (math.sqrt(2), math.sqrt(2))
    batch_sizes: IntRange = (10, 10)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)

    def draw(self, generator: Generator, copies: int) -> SinusoidTask:
        return SinusoidTask(
            copies=copies,
            hidden=choice(generator, self.hidden_sizes),
            activation=choice(generator, self.activations),
            gain=log_uniform(generator, self.gains),
            batch_size=log_integer(generator, self.batch_sizes),
            amplitude=uniform_tensor(generator, self.amplitudes, (copies, 1, 1)),
            phase=uniform_tensor(generator, self.phases, (copies, 1, 1)),
        )
