"""Building blocks of optimizees: parameters carry ``copies`` first when made, and not when used."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Task

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}
COMMON_ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid", "elu")
"""What families draw from unless told otherwise. It stays as it is, so that a seed keeps meaning the same tasks."""

Norm = Literal["none", "layer", "group", "batch"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def weight(generator: Generator, copies: int, *shape: int, fan_in: int, gain: float = 1.0) -> Tensor:
    """Gaussian weights of variance ``gain² / fan_in``, ``(copies, *shape)``."""
    return torch.randn(copies, *shape, generator=generator) * (gain / math.sqrt(fan_in))


def init_mlp(generator: Generator, copies: int, sizes: Sequence[int], gain: float = 1.0) -> Params:
    """Weights and zero biases of a fully connected net, ``sizes`` from input to output."""
    params: Params = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        params[f"{i}.weight"] = weight(generator, copies, fan_in, fan_out, fan_in=fan_in, gain=gain)
        params[f"{i}.bias"] = torch.zeros(copies, fan_out)
    return params


def mlp(params: Params, x: Tensor, activation: str) -> Tensor:
    """The fully connected net of :func:`init_mlp`, linear at its output: ``(batch, in) -> (batch, out)``."""
    depth = len(params) // 2
    for i in range(depth):
        x = x @ params[f"{i}.weight"] + params[f"{i}.bias"]
        if i < depth - 1:
            x = ACTIVATIONS[activation](x)
    return x


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """``x`` with mean 0 and variance 1, ``(batch, channels, ...)`` as it came.

    ``"batch"``: each channel, over the batch at hand (also on held-out data, so that there is no running state);
    ``"layer"``: each example, over all of it; ``"group"``: each half of an example's channels; ``"none"``: as it is.
    """
    if norm == "none":
        return x
    if norm == "batch":
        return F.batch_norm(x, None, None, training=True)
    return F.group_norm(x, 1 if norm == "layer" else 2)


class ClassificationTask(Task):
    """A task whose batch is (inputs, classes) and whose loss is the mean cross-entropy of :meth:`logits`."""

    @abstractmethod
    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Unnormalized log-probabilities of one copy, classes last."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.logits(params, x).flatten(0, -2), y.flatten())

    def accuracy(self, params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return (self.logits(params, x).argmax(-1) == y).float().mean()
