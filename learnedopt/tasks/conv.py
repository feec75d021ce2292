"""Small convolutional nets that classify images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.data import ImageData, digits
from learnedopt.tasks.base import Batch, Params, Split, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, integer, log_integer, log_uniform, minibatch
from learnedopt.tasks.layers import (
    ACTIVATIONS,
    COMMON_ACTIVATIONS,
    NORMS,
    ClassificationTask,
    Norm,
    normalize,
    weight,
)


@dataclass(frozen=True, eq=False)
class ConvTask(ClassificationTask):
    """3 x 3 convolutions of stride two, each with its norm and activation, then a linear layer.

    Batch norm always uses the statistics of the batch at hand, also on held-out data.
    """

    copies: int
    data: ImageData
    channels: tuple[int, ...]
    norm: Norm
    activation: str
    gain: float
    batch_size: int

    def init(self, generator: Generator) -> Params:
        copies, gain = self.copies, self.gain
        fan_in, height, width = self.data.train[0][0].shape
        params: Params = {}
        for i, channels in enumerate(self.channels):
            params[f"{i}.weight"] = weight(generator, copies, channels, fan_in, 3, 3, fan_in=9 * fan_in, gain=gain)
            params[f"{i}.bias"] = torch.zeros(copies, channels)
            if self.norm != "none":
                params[f"{i}.norm"] = torch.ones(copies, channels)
            fan_in, height, width = channels, (height + 1) // 2, (width + 1) // 2
        flat = fan_in * height * width
        params["output"] = weight(generator, copies, flat, self.data.num_classes, fan_in=flat, gain=gain)
        params["output_bias"] = torch.zeros(copies, self.data.num_classes)
        return params

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return minibatch(generator, self.copies, self.batch_size, *self.data.split(split))

    def logits(self, params: Params, x: Tensor) -> Tensor:
        for i in range(len(self.channels)):
            x = normalize(F.conv2d(x, params[f"{i}.weight"], stride=2, padding=1), self.norm)
            if self.norm != "none":
                x = x * params[f"{i}.norm"][:, None, None]
            x = ACTIVATIONS[self.activation](x + params[f"{i}.bias"][:, None, None])
        return x.flatten(1) @ params["output"] + params["output_bias"]


@dataclass(frozen=True)
class Conv(TaskFamily):
    """One or two convolutions on ``data``; the number of channels doubles from one to the next.

    The first numbers of ``channels`` are even, because group norm takes two groups.

    >>> task = Conv(layers=(2, 2), channels=(4,)).draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.channels
    (4, 8)
    """

    data: ImageData = field(default_factory=digits)
    layers: IntRange = (1, 2)
    channels: tuple[int, ...] = (4, 6, 8)
    norms: tuple[Norm, ...] = NORMS
    activations: tuple[str, ...] = COMMON_ACTIVATIONS
    gains: Range = (0.5, 2.0)
    batch_sizes: IntRange = (8, 32)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)
        check_known("norm", self.norms, NORMS)
        if any(channels < 2 or channels % 2 for channels in self.channels):
            raise ValueError(f"channels must be even, as two groups need, got {self.channels}")

    def draw(self, generator: Generator, copies: int) -> ConvTask:
        first = choice(generator, self.channels)
        return ConvTask(
            copies=copies,
            data=self.data,
            channels=tuple(first * 2**i for i in range(integer(generator, self.layers))),
            norm=choice(generator, self.norms),
            activation=choice(generator, self.activations),
            gain=log_uniform(generator, self.gains),
            batch_size=log_integer(generator, self.batch_sizes),
        )
