"""The convolutional net of Andrychowicz et al. 2016: convolutions, max pooling, a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.data import ImageData, digits
from learnedopt.tasks.base import Batch, Params, Split, TaskFamily
from learnedopt.tasks.draws import Range, check_known, choice, log_uniform, minibatch
from learnedopt.tasks.layers import ACTIVATIONS, NORMS, ClassificationTask, Norm, normalize, weight


@dataclass(frozen=True, eq=False)
class ConvPoolTask(ClassificationTask):
    """One drawn structure of :class:`ConvPool`.

    Parameters are called ``conv.0.weight`` and so on, then ``hidden.…`` and ``output.…``, so that a convolution's can
    be told from the others. A bias is added after the norm, which has no scale of its own.
    """

    copies: int
    data: ImageData
    channels: tuple[int, ...]
    kernel: int
    hidden: int
    norm: Norm
    activation: str
    batch_size: int
    initial_std: float | None
    gain: float

    def init(self, generator: Generator) -> Params:
        fan_in, height, width = self.data.train[0][0].shape
        shapes: dict[str, tuple[int, ...]] = {}
        for i, channels in enumerate(self.channels):
            shapes[f"conv.{i}"] = (channels, fan_in, self.kernel, self.kernel)
            fan_in, height, width = channels, (height + 1) // 2, (width + 1) // 2
        shapes["hidden"] = (self.hidden, fan_in * height * width)
        shapes["output"] = (self.data.num_classes, self.hidden)
        params: Params = {}
        for name, shape in shapes.items():
            if self.initial_std is None:
                fan = torch.Size(shape[1:]).numel()
                params[f"{name}.weight"] = weight(generator, self.copies, *shape, fan_in=fan, gain=self.gain)
                params[f"{name}.bias"] = torch.zeros(self.copies, shape[0])
            else:
                for part, size in (("weight", shape), ("bias", shape[:1])):
                    params[f"{name}.{part}"] = self.initial_std * torch.randn(self.copies, *size, generator=generator)
        return params

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return minibatch(generator, self.copies, self.batch_size, *self.data.split(split))

    def logits(self, params: Params, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        for i in range(len(self.channels)):
            x = normalize(F.conv2d(x, params[f"conv.{i}.weight"], padding=self.kernel // 2), self.norm)
            x = activation(x + params[f"conv.{i}.bias"][:, None, None])
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = normalize(F.linear(x.flatten(1), params["hidden.weight"]), self.norm)
        x = activation(x + params["hidden.bias"])
        return F.linear(x, params["output.weight"], params["output.bias"])

    def __repr__(self) -> str:
        channels = "-".join(map(str, self.channels))
        return (
            f"ConvPoolTask({self.data.name}, channels={channels}, hidden={self.hidden}, norm={self.norm}, "
            f"{self.activation}, batch_size={self.batch_size})"
        )


@dataclass(frozen=True)
class ConvPool(TaskFamily):
    r"""Convolutions of stride one, each followed by its norm, activation and 2 x 2 max pooling, then a hidden layer.

    Each draw picks one of ``channels``, ``hidden``, ``norms``, ``activations``, ``batch_sizes``. Initial parameters are
    normal: all with standard deviation ``initial_std`` where it is given, as in the authors' code of Andrychowicz et
    al. 2016 (but for the offsets of batch norm, which start at zero there); where it is ``None``, weights with
    :math:`g/\sqrt{\text{fan-in}}`, g log-uniform in ``gains``, and zero biases. Batch norm always uses the statistics
    of the batch at hand, also on held-out data.

    The defaults are the network of that paper's section 3.3 (arXiv:1606.04474): three layers, 16 channels each of 5 x 5
    kernels in the authors' code, 32 hidden units, ReLU, batch norm, batches of 128. The paper trains it on CIFAR-10 and
    on subsets of two and five of its classes, with rules meta-trained on the same or on the other classes:

    .. code-block:: python

        cifar2 = label_subset(cifar10(root), (0, 1))
        others = label_subset(cifar10(root), (0, 1), held_out=True)
        ConvPool(data=cifar2)

    Raises ``ValueError`` for an unknown norm or activation, an even ``kernel``, or odd channels or hidden units where
    group norm needs two groups of them.

    >>> task = ConvPool().draw(torch.Generator().manual_seed(0), copies=2)
    >>> task
    ConvPoolTask(digits, channels=16-16-16, hidden=32, norm=batch, relu, batch_size=128)
    """

    data: ImageData = field(default_factory=digits)
    channels: tuple[tuple[int, ...], ...] = ((16, 16, 16),)
    kernel: int = 5
    hidden: tuple[int, ...] = (32,)
    norms: tuple[Norm, ...] = ("batch",)
    activations: tuple[str, ...] = ("relu",)
    batch_sizes: tuple[int, ...] = (128,)
    initial_std: float | None = 0.01
    gains: Range = (1.0, 1.0)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)
        check_known("norm", self.norms, NORMS)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the image keeps its size, got {self.kernel}")
        if "group" in self.norms and any(n % 2 for n in (*self.hidden, *(n for some in self.channels for n in some))):
            raise ValueError(f"group norm needs even channels and hidden units, got {self.channels} and {self.hidden}")

    def draw(self, generator: Generator, copies: int) -> ConvPoolTask:
        return ConvPoolTask(
            copies=copies,
            data=self.data,
            channels=choice(generator, self.channels),
            kernel=self.kernel,
            hidden=choice(generator, self.hidden),
            norm=choice(generator, self.norms),
            activation=choice(generator, self.activations),
            batch_size=choice(generator, self.batch_sizes),
            initial_std=self.initial_std,
            gain=log_uniform(generator, self.gains),
        )
