"""Labeled images as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, Literal

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
    return _torchvision("mnist", "MNIST", root, download, "MNIST/raw", "train-images-idx3-ubyte", held_out=12)


@cache
def fashion_mnist(root: str | PathLike[str], download: bool = False) -> ImageData:
    """Fashion-MNIST through torchvision: ten kinds of clothing in the format and the splits of :func:`mnist`.

    The files are looked for in ``<root>/FashionMNIST/raw``. Raises as :func:`mnist` does.
    """
    return _torchvision(
        "fashion_mnist", "FashionMNIST", root, download, "FashionMNIST/raw", "train-images-idx3-ubyte", held_out=12
    )


@cache
def cifar10(root: str | PathLike[str], download: bool = False) -> ImageData:
    """CIFAR-10 through torchvision: 45,000 training images, the last 5,000 for validation, 10,000 test images.

    Color images of 32 x 32 pixels, 740 MB in memory. The files are looked for in ``<root>/cifar-10-batches-py``; where
    that is not, a copy as JPEG or PNG files in ``<root>/cifar10`` is read by :func:`image_folder`. Raises as
    :func:`mnist` does.
    """
    copied = Path(root) / "cifar10"
    if copied.is_dir() and not ((Path(root) / "cifar-10-batches-py").exists() or download):
        return image_folder(copied)
    return _torchvision("cifar10", "CIFAR10", root, download, "cifar-10-batches-py", "data_batch_1", held_out=10)


@cache
def image_folder(root: str | PathLike[str], name: str | None = None) -> ImageData:
    """Images of one size in ``<root>/train/<class>/`` and ``<root>/test/<class>/``, as colors.

    Classes are numbered in the order of their folders' names. Every tenth image of a class (the tenth, twentieth, … by
    file name) of ``train`` is for validation. ``name`` is the data's, the folder's without it. Raises
    ``FileNotFoundError`` if there are no such folders, ``ValueError`` if images differ in size or the two folders in
    their classes, ``ImportError`` without torchvision.
    """
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms.functional import pil_to_tensor
    except ImportError as error:
        raise ImportError("image_folder() needs torchvision: pip install 'learnedopt[train]'") from error
    root = Path(root)
    try:
        parts = {part: ImageFolder(str(root / part), transform=pil_to_tensor) for part in ("train", "test")}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no images under {str(root)!r}, expected as train/CLASS/FILE and test/CLASS/FILE"
        ) from error
    if parts["train"].classes != parts["test"].classes:
        raise ValueError(f"{str(root / 'train')!r} and {str(root / 'test')!r} differ in their classes")
    tensors = {}
    for part, images in parts.items():
        pixels, classes = zip(*images)
        if len(sizes := {tuple(image.shape) for image in pixels}) > 1:
            raise ValueError(f"images under {str(root / part)!r} differ in size: {sorted(sizes)}; make them one size")
        tensors[part] = torch.stack(pixels).float().div_(255), torch.tensor(classes)
    x, y = tensors["train"]
    place = torch.cat([torch.arange(int(count)) for count in y.bincount()])  # of each image within its class
    held_out = place % 10 == 9
    return ImageData(
        name or root.name,
        len(parts["train"].classes),
        (x[~held_out], y[~held_out]),
        (x[held_out], y[held_out]),
        tensors["test"],
    )


def label_subset(data: ImageData, labels: Iterable[int], held_out: bool = False) -> ImageData:
    """The images of some classes, renumbered from 0 in the order of ``labels``.

    With ``held_out`` those of all other classes instead, in their old order: what a rule is meta-trained on that is
    then judged on ``labels`` (Andrychowicz et al. 2016, section 3.3: subsets of CIFAR-10 with two and five labels).

    Raises ``ValueError`` for labels that do not exist or occur twice, and if no class is left.

    >>> small = label_subset(digits(), (3, 7))
    >>> small.num_classes, small.train[1].unique().tolist()
    (2, [0, 1])
    >>> label_subset(digits(), (3, 7), held_out=True).num_classes
    8
    """
    labels = list(labels)
    if len(set(labels)) < len(labels) or not set(labels) <= set(range(data.num_classes)):
        raise ValueError(f"labels must be different numbers from 0 to {data.num_classes - 1}, got {labels}")
    kept = [label for label in range(data.num_classes) if label not in labels] if held_out else labels
    if not kept:
        raise ValueError(f"no class of {data.name} is left without {labels}" if held_out else "labels are empty")
    number = torch.full((data.num_classes,), -1)
    number[kept] = torch.arange(len(kept))

    def subset(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mine = number[y] >= 0
        return x[mine], number[y[mine]]

    name = f"{data.name}-{'-'.join(map(str, kept))}"
    return ImageData(name, len(kept), subset(*data.train), subset(*data.validation), subset(*data.test))


def split_by_class(name: str, images: Tensor) -> ImageData:
    """Data of which there are equally many examples per class, ``(classes, examples, channels, height, width)``.

    Of every class 70 % of the examples, rounded down, are for training, half of the rest for validation, the others for
    testing. Raises ``ValueError`` for fewer than 4 examples, with which a split would be empty.

    >>> split_by_class("noise", torch.rand(3, 10, 1, 4, 4)).validation[1]
    tensor([0, 1, 2])
    """
    classes, examples = images.shape[:2]
    if examples < 4:
        raise ValueError(f"examples must be at least 4, so that no split is empty, got {examples}")
    train = examples * 7 // 10
    sizes = [train, (examples - train) // 2, (examples - train + 1) // 2]
    labels = torch.arange(classes)[:, None].expand(classes, examples)
    splits = [(x.flatten(0, 1), y.flatten()) for x, y in zip(images.split(sizes, 1), labels.split(sizes, 1))]
    return ImageData(name, classes, *splits)


def _torchvision(
    name: str, dataset: str, root: str | PathLike[str], download: bool, folder: str, example: str, held_out: int
) -> ImageData:
    """A data set of torchvision with ten classes; the last one in ``held_out`` training images for validation."""
    try:
        import torchvision.datasets as datasets
    except ImportError as error:
        raise ImportError(f"{name}() needs torchvision: pip install 'learnedopt[train]'") from error
    make = getattr(datasets, dataset)
    try:
        parts = make(root, train=True, download=download), make(root, train=False, download=download)
    except RuntimeError as error:
        if download:  # torchvision's own account of what failed is the better one
            raise
        raise FileNotFoundError(
            f"no {dataset} under {str(root)!r}: pass download=True, or put its unpacked files "
            f"({example} and so on) into {str(Path(root) / folder)!r}"
        ) from error
    (x, y), test = (_tensors(part.data, part.targets) for part in parts)
    last = len(x) - len(x) // held_out
    return ImageData(name, 10, (x[:last], y[:last]), (x[last:], y[last:]), test)


def _tensors(pixels: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Gray ``(N, height, width)`` or colors last, bytes, as :class:`ImageData` has them."""
    x = torch.as_tensor(pixels)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.float().div_(255).contiguous(), torch.as_tensor(labels)
