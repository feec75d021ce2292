"""Labelled images as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from os import PathLike
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and their classes in three disjoint splits.

    A split is a pair: images, float32 ``(N, channels, height, width)`` in [0, 1], and classes, int64 ``(N,)``.

    >>> data = digits()
    >>> x, y = data.split("train")
    >>> x.shape, y.shape, data.num_classes
    (torch.Size([1200, 1, 8, 8]), torch.Size([1200]), 10)
    """

    name: str
    num_classes: int
    train: tuple[Tensor, Tensor] = field(repr=False)
    validation: tuple[Tensor, Tensor] = field(repr=False)
    test: tuple[Tensor, Tensor] = field(repr=False)

    def split(self, name: Literal["train", "validation", "test"]) -> tuple[Tensor, Tensor]:
        """Images and classes of one split; raises ``ValueError`` for another name."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"split must be 'train', 'validation' or 'test', got {name!r}")
        pair: tuple[Tensor, Tensor] = getattr(self, name)
        return pair


@cache
def digits() -> ImageData:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, shuffled once and for all.

    1,200 for training, 300 for validation, 297 for testing. Needs no download. Raises ``ImportError`` without
    scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install 'learnedopt[train]'") from error
    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)
    y = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, validation, test = ((x[part], y[part]) for part in order.split([1200, 300, 297]))
    return ImageData("digits", 10, train, validation, test)


@cache
def mnist(root: str | PathLike[str], download: bool = False) -> ImageData:
    """MNIST through torchvision: the first 55,000 training images, the last 5,000 for validation, 10,000 test images.

    The files are looked for where torchvision keeps them, ``<root>/MNIST/raw``. Raises ``FileNotFoundError`` if they
    are not there and ``download`` is false, ``ImportError`` without torchvision.
    """
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ImportError("mnist() needs torchvision: pip install 'learnedopt[train]'") from error
    try:
        train, test = MNIST(root, train=True, download=download), MNIST(root, train=False, download=download)
    except RuntimeError as error:
        if download:  # torchvision's own account of what failed is the better one
            raise
        raise FileNotFoundError(
            f"no MNIST under {str(root)!r}: pass download=True, or put the four unpacked files "
            f"(train-images-idx3-ubyte and so on) into {str(root)!r}/MNIST/raw"
        ) from error
    (x, y), (test_x, test_y) = ((part.data.unsqueeze(1).float() / 255, part.targets) for part in (train, test))
    return ImageData("mnist", 10, (x[:55_000], y[:55_000]), (x[55_000:], y[55_000:]), (test_x, test_y))
