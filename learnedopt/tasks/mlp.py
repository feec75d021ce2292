"""Multilayer perceptrons that classify images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.data.images import ImageData, digits
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily

T = TypeVar("T")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "elu": F.elu,
}


@dataclass(frozen=True)
class MLPClassification(TaskFamily):
    r"""Cross entropy of an MLP on minibatches of images, drawn with replacement.

    Each draw picks one of ``hidden_sizes``, ``activations``, ``batch_sizes``. Weights start normal: with standard
    deviation ``initial_std`` for weights and biases alike where it is given, as in the authors' code of Andrychowicz
    et al. 2016; otherwise with :math:`g/\sqrt{\text{fan-in}}`, the gain g log-uniform in ``gains``, and zero biases.

    The defaults are the network of that paper's section 3.2 (one hidden layer of 20 sigmoid units, batches of 128).
    """

    data: ImageData = field(default_factory=digits)
    hidden_sizes: tuple[tuple[int, ...], ...] = ((20,),)
    activations: tuple[str, ...] = ("sigmoid",)
    batch_sizes: tuple[int, ...] = (128,)
    initial_std: float | None = 0.01
    gains: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.activations) - ACTIVATIONS.keys()):
            raise ValueError(f"unknown activation(s) {unknown}; known: {sorted(ACTIVATIONS)}")

    def draw(self, generator: Generator, copies: int) -> Task:
        low, high = (math.log(gain) for gain in self.gains)
        return MLP(
            copies=copies,
            data=self.data,
            hidden=choose(self.hidden_sizes, generator),
            activation=choose(self.activations, generator),
            batch_size=choose(self.batch_sizes, generator),
            initial_std=self.initial_std,
            gain=math.exp(low + (high - low) * torch.rand((), generator=generator).item()),
        )


@dataclass(frozen=True, eq=False)
class MLP(Task):
    """One drawn structure of :class:`MLPClassification`."""

    copies: int
    data: ImageData
    hidden: tuple[int, ...]
    activation: str
    batch_size: int
    initial_std: float | None = None
    gain: float = 1.0

    def init(self, generator: Generator) -> Params:
        widths = (self.data.train[0][0].numel(), *self.hidden, self.data.num_classes)
        params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
            std = self.gain / math.sqrt(fan_in) if self.initial_std is None else self.initial_std
            params[f"weight{layer}"] = std * torch.randn(self.copies, fan_in, fan_out, generator=generator)
            if self.initial_std is None:
                params[f"bias{layer}"] = torch.zeros(self.copies, fan_out)
            else:
                params[f"bias{layer}"] = std * torch.randn(self.copies, fan_out, generator=generator)
        return params

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        images, labels = self.data.split(split)
        index = torch.randint(len(labels), (self.copies, self.batch_size), generator=generator)
        return images[index].flatten(2), labels[index]

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """Class scores ``(examples, classes)`` of one copy for flattened images ``(examples, pixels)``."""
        x = images
        for layer in range(len(self.hidden) + 1):
            if layer:
                x = ACTIVATIONS[self.activation](x)
            x = torch.addmm(params[f"bias{layer}"], x, params[f"weight{layer}"])
        return x

    def loss(self, params: Params, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.logits(params, images), labels)

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        images, labels = batch
        return (self.logits(params, images).argmax(-1) == labels).float().mean()

    def __repr__(self) -> str:
        hidden = "-".join(map(str, self.hidden))
        return f"MLP({self.data.name}, hidden={hidden}, {self.activation}, batch_size={self.batch_size})"


def choose(options: tuple[T, ...], generator: Generator) -> T:
    """One of ``options``, uniformly."""
    return options[int(torch.randint(len(options), (), generator=generator))]
