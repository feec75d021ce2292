"""Fixed convolutional nets whose activations describe an image: what style transfer compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.tasks.layers import weight

Layer = tuple[Tensor, Tensor]
"""Weights ``(out, in, 3, 3)`` and biases ``(out,)`` of a convolution."""


@dataclass(frozen=True, eq=False)
class ConvFeatures:
    """Blocks of 3 x 3 convolutions with ReLU; between blocks, 2 x 2 average pooling.

    Average, where a classifier takes the maximum, because gradients with respect to the image are smoother (Gatys et
    al. 2015, *Texture Synthesis Using Convolutional Neural Networks*, arXiv:1505.07376).
    """

    name: str
    blocks: tuple[tuple[Layer, ...], ...] = field(repr=False)
    mean: tuple[float, float, float] = field(repr=False)
    """Subtracted from the colors of an image in [0, 1] first."""
    std: tuple[float, float, float] = field(repr=False)
    """What they are divided by then."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The activations at the end of each block, ``(N, channels, height / 2^block, width / 2^block)``.

        ``images`` are ``(N, 3, height, width)``, on any device and in any precision: the weights follow at every call,
        which costs nothing where :meth:`to` has put them.
        """
        x = (images - self._color(images, self.mean)) / self._color(images, self.std)
        activations = []
        for i, block in enumerate(self.to(images.device, images.dtype).blocks):
            if i:
                x = F.avg_pool2d(x, 2)
            for weights, biases in block:
                x = F.conv2d(x, weights, biases, padding=1).relu()
            activations.append(x)
        return activations

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> ConvFeatures:
        """The same features with the weights there; on a GPU, spares copying them at every evaluation of a loss."""
        moved = ([(weights.to(device, dtype), biases.to(device, dtype)) for weights, biases in b] for b in self.blocks)
        return replace(self, blocks=tuple(map(tuple, moved)))

    @staticmethod
    def _color(like: Tensor, values: tuple[float, float, float]) -> Tensor:
        return torch.stack([torch.full_like(like[0, 0], value) for value in values])


def random_features(channels: Sequence[int] = (16, 32, 64), seed: int = 0) -> ConvFeatures:
    """One random convolution per block: a stand-in for a trained net that needs no download.

    Weights are normal with variance 2 / fan-in, which keeps activations of one size, biases zero. The style that the
    correlations of such features describe is color, edge directions and their coincidence at scales that double from
    block to block: enough to make recognizable textures (Ustyuzhaninov et al. 2016, arXiv:1606.00021) and to transfer
    styles (He et al. 2016, arXiv:1606.04801). What they lack is the content of a trained net's deep layers: objects.

    >>> [tuple(x.shape) for x in random_features()(torch.rand(2, 3, 16, 16))]
    [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4)]
    """
    generator = Generator().manual_seed(seed)
    blocks = tuple(
        ((weight(generator, 1, out, into, 3, 3, fan_in=9 * into, gain=2**0.5)[0], torch.zeros(out)),)
        for into, out in pairwise((3, *channels))
    )
    return ConvFeatures(f"random-{'-'.join(map(str, channels))}", blocks, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def vgg16_features(path: str | PathLike[str], download: bool = False) -> ConvFeatures:
    """The first four blocks of VGG-16 (Simonyan & Zisserman 2014) with torchvision's ImageNet weights.

    Args:
        path: Torchvision's file of weights, ``vgg16-397923af.pth``.
        download: Fetch it to ``path`` (528 MB) if it is not there.

    Raises:
        FileNotFoundError: there is no such file and ``download`` is false.
        ValueError: the file has other weights.
        ImportError: torchvision is to say where to download from, and is not installed.
    """
    path = Path(path)
    if not path.exists():
        if not download:
            raise FileNotFoundError(
                f"no weights at {str(path)!r}: pass download=True, or put torchvision's vgg16-397923af.pth there; "
                "random_features() needs none"
            )
        try:
            from torchvision.models import VGG16_Weights
        except ImportError as error:
            raise ImportError("downloading VGG-16 needs torchvision: pip install 'learnedopt[train]'") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            VGG16_Weights.IMAGENET1K_V1.url, str(path), hash_prefix="397923af", progress=False
        )
    weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        blocks = tuple(
            tuple((weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]) for i in block) for block in _VGG16
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} does not hold the weights of torchvision's vgg16: {error} is missing"
        ) from error
    return ConvFeatures("vgg16", blocks, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


# The places of the convolutions in ``vgg16().features``, block by block.
_VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21))
