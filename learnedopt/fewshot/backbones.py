"""The networks of the few-shot literature, as plain modules: examples ``(n, *example)`` to features ``(n, d)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from learnedopt.fewshot.config import Config, check_choice


@dataclass(frozen=True)
class BackboneConfig(Config):
    """Settings of a network."""

    def build(self, example_shape: tuple[int, ...]) -> nn.Module:
        """A fresh network, with torch's own initial weights, for examples of this shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conv4(BackboneConfig):
    """Four times a 3×3 convolution, batch normalization, ReLU and halving.

    ``"pool"``: 2×2 max-pooling halves, and the features are everything that is left: 64 for an image of 28×28 and
    width 64, 1600 for 84×84 (Vinyals et al. 2016, arXiv:1606.04080; Snell et al. 2017, arXiv:1703.05175).
    ``"stride"``: the convolutions have stride 2, and the features are means over the image: MAML's network for
    Omniglot (Finn et al. 2017, arXiv:1703.03400, section 5.2).

    >>> import torch
    >>> Conv4(width=8).build((1, 28, 28))(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 8])
    """

    kind: ClassVar[str] = "conv4"
    width: int = 64
    downsample: Literal["pool", "stride"] = "pool"
    batch_norm: bool = True

    def __post_init__(self) -> None:
        check_choice("downsample", self.downsample, ("pool", "stride"))
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def build(self, example_shape: tuple[int, ...]) -> nn.Module:
        if len(example_shape) != 3:
            raise ValueError(f"conv4 is for images (channels, height, width), got examples of shape {example_shape}")
        if self.downsample == "pool" and min(example_shape[1:]) < 16:
            raise ValueError(
                f"images of {example_shape[1]}×{example_shape[2]} cannot be halved four times: use at least 16×16, or "
                "downsample='stride'"
            )
        layers: list[nn.Module] = []
        channels = example_shape[0]
        for _ in range(4):
            layers.append(nn.Conv2d(channels, self.width, 3, 2 if self.downsample == "stride" else 1, padding=1))
            if self.batch_norm:
                layers.append(nn.BatchNorm2d(self.width))
            layers.append(nn.ReLU())
            if self.downsample == "pool":
                layers.append(nn.MaxPool2d(2))
            channels = self.width
        if self.downsample == "stride":
            layers.append(nn.AdaptiveAvgPool2d(1))
        # Weights with channels last: the same numbers, and twice the speed of these layers on a CPU.
        return nn.Sequential(*layers, nn.Flatten()).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class MLP(BackboneConfig):
    """Fully connected layers with ReLU; examples are flattened. The features are the last hidden layer.

    ``hidden=(40, 40)`` is MAML's network for the sinusoid; ``hidden=(256, 128, 64, 64), batch_norm=True`` its network
    without convolutions for Omniglot (Finn et al. 2017, arXiv:1703.03400, sections 5.1 and 5.2).

    >>> import torch
    >>> MLP().build((1,))(torch.zeros(3, 1)).shape
    torch.Size([3, 40])
    """

    kind: ClassVar[str] = "mlp"
    hidden: tuple[int, ...] = (40, 40)
    batch_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must name at least one layer, of at least one unit, got {self.hidden}")

    def build(self, example_shape: tuple[int, ...]) -> nn.Module:
        sizes = (math.prod(example_shape), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(sizes, self.hidden):
            layers.append(nn.Linear(inputs, outputs))
            if self.batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)


BACKBONES: dict[str, type[BackboneConfig]] = {"conv4": Conv4, "mlp": MLP}
"""Every backbone by name."""
