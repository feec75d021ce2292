"""Autoencoders of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.data import ImageData, digits
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, log_integer, log_uniform, minibatch
from learnedopt.tasks.layers import ACTIVATIONS, COMMON_ACTIVATIONS, init_mlp, mlp


@dataclass(frozen=True, eq=False)
class AutoencoderTask(Task):
    """Reconstruct the pixels through a bottleneck: their mean squared error, or binary cross-entropy from logits."""

    copies: int
    data: ImageData
    sizes: tuple[int, ...]
    activation: str
    gain: float
    reconstruction: Literal["mse", "bce"]
    batch_size: int

    def init(self, generator: Generator) -> Params:
        return init_mlp(generator, self.copies, self.sizes, self.gain)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        x, _ = self.data.split(split)
        return minibatch(generator, self.copies, self.batch_size, x.flatten(1))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        (x,) = batch
        output = mlp(params, x, self.activation)
        if self.reconstruction == "mse":
            return F.mse_loss(output, x)
        return (F.softplus(output) - x * output).mean()


@dataclass(frozen=True)
class Autoencoder(TaskFamily):
    """Autoencoders of ``data``; ``hidden`` layers on either side of the code, none or one.

    >>> import torch
    >>> task = Autoencoder().draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.sizes[0] == task.sizes[-1] == 64
    True
    """

    data: ImageData = field(default_factory=digits)
    hidden: tuple[int, ...] = (0, 1)
    widths: IntRange = (16, 48)
    codes: IntRange = (3, 16)
    activations: tuple[str, ...] = COMMON_ACTIVATIONS
    reconstructions: tuple[Literal["mse", "bce"], ...] = ("mse", "bce")
    gains: Range = (0.5, 2.0)
    batch_sizes: IntRange = (8, 64)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)
        check_known("reconstruction", self.reconstructions, ("mse", "bce"))

    def draw(self, generator: Generator, copies: int) -> AutoencoderTask:
        pixels = self.data.train[0][0].numel()
        side = [log_integer(generator, self.widths)] * choice(generator, self.hidden)
        return AutoencoderTask(
            copies=copies,
            data=self.data,
            sizes=(pixels, *side, log_integer(generator, self.codes), *side, pixels),
            activation=choice(generator, self.activations),
            gain=log_uniform(generator, self.gains),
            reconstruction=choice(generator, self.reconstructions),
            batch_size=log_integer(generator, self.batch_sizes),
        )
