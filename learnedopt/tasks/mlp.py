"""Multilayer perceptrons that classify images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from learnedopt.data import ImageData, digits
from learnedopt.tasks.base import Batch, Params, Split, TaskFamily
from learnedopt.tasks.draws import Range, check_known, choice, log_uniform, minibatch
from learnedopt.tasks.layers import ACTIVATIONS, ClassificationTask, init_mlp, mlp


@dataclass(frozen=True, eq=False)
class MLP(ClassificationTask):
    """One drawn structure of :class:`MLPClassification`."""

    copies: int
    data: ImageData
    hidden: tuple[int, ...]
    activation: str
    batch_size: int
    initial_std: float | None = None
    gain: float = 1.0

    def init(self, generator: Generator) -> Params:
        pixels = self.data.train[0][0].numel()
        params = init_mlp(generator, self.copies, (pixels, *self.hidden, self.data.num_classes), self.gain)
        if self.initial_std is None:
            return params
        return {
            name: self.initial_std * torch.randn(value.shape, generator=generator) for name, value in params.items()
        }

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        images, labels = minibatch(generator, self.copies, self.batch_size, *self.data.split(split))
        return images.flatten(2), labels

    def logits(self, params: Params, x: Tensor) -> Tensor:
        return mlp(params, x, self.activation)

    def __repr__(self) -> str:
        hidden = "-".join(map(str, self.hidden)) or "none"
        return f"MLP({self.data.name}, hidden={hidden}, {self.activation}, batch_size={self.batch_size})"


@dataclass(frozen=True)
class MLPClassification(TaskFamily):
    r"""Cross entropy of an MLP on minibatches of flattened images, drawn with replacement.

    Each draw picks one of ``hidden_sizes``, ``activations``, ``batch_sizes``. Initial weights are normal: with
    standard deviation ``initial_std``, biases too, where it is given, as in the authors' code of Andrychowicz et al.
    2016; where it is ``None`` with :math:`g/\sqrt{\text{fan-in}}`, the gain g log-uniform in ``gains``, and zero
    biases.

    The defaults are the network of that paper's section 3.2 (one hidden layer of 20 sigmoid units, batches of 128).
    """

    data: ImageData = field(default_factory=digits)
    hidden_sizes: tuple[tuple[int, ...], ...] = ((20,),)
    activations: tuple[str, ...] = ("sigmoid",)
    batch_sizes: tuple[int, ...] = (128,)
    initial_std: float | None = 0.01
    gains: Range = (1.0, 1.0)

    def __post_init__(self) -> None:
        check_known("activations", self.activations, ACTIVATIONS)

    def draw(self, generator: Generator, copies: int) -> MLP:
        return MLP(
            copies=copies,
            data=self.data,
            hidden=choice(generator, self.hidden_sizes),
            activation=choice(generator, self.activations),
            batch_size=choice(generator, self.batch_sizes),
            initial_std=self.initial_std,
            gain=log_uniform(generator, self.gains),
        )
