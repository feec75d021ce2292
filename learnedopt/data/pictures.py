"""Colored images that need no download: tiles of photographs, and drawn textures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Generator, Tensor

from learnedopt.data.images import ImageData, split_by_class


@cache
def photographs(size: int = 32) -> ImageData:
    """Tiles of the two photographs that come with scikit-learn, a temple (class 0) and a flower (class 1).

    Each is averaged down to half its resolution and cut into as many square tiles as it holds side by side: with 32
    pixels, 120 in all. They are shuffled once and for all; a tenth (rounded down) is for validation, a
    tenth for testing, the rest for training. Tiles do not overlap, so that the splits share no pixel.

    Raises ``ValueError`` unless ``size`` leaves at least 10 tiles; ``ImportError`` without scikit-learn.

    >>> x, y = photographs().split("train")
    >>> x.shape
    torch.Size([96, 3, 32, 32])
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("photographs() needs scikit-learn: pip install 'learnedopt[train]'") from error
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]).float() / 255
    half = torch.nn.functional.avg_pool2d(pixels, 2)
    down, across = (length // size if size > 0 else 0 for length in half.shape[2:])
    if 2 * down * across < 10:
        raise ValueError(f"size must be positive and leave at least 10 tiles of 213 x 320 pixels, got {size}")
    half = half[:, :, : down * size, : across * size]
    x = half.unflatten(2, (down, size)).unflatten(4, (across, size)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    y = torch.arange(2).repeat_interleave(down * across)
    order = torch.randperm(len(x), generator=Generator().manual_seed(0))
    tenth = len(x) // 10
    train, validation, test = ((x[part], y[part]) for part in order.split([len(x) - 2 * tenth, tenth, tenth]))
    return ImageData("photographs", 2, train, validation, test)


# Heights in [-1, 1] from two coordinates, in wavelengths times 2π, and a few random phases.
_PATTERNS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "stripes": lambda u, v, p: torch.sin(u + p[0]),
    "checks": lambda u, v, p: torch.tanh(4 * torch.sin(u + p[0]) * torch.sin(v + p[1])),
    "dots": lambda u, v, p: torch.tanh(3 * (torch.cos(u + p[0]) + torch.cos(v + p[1]) - 0.7)),
    "rings": lambda u, v, p: torch.sin(torch.hypot(u + 2 * p[0], v + 2 * p[1])),
    "waves": lambda u, v, p: torch.sin(u + 1.5 * torch.sin(0.7 * v + p[0]) + p[1]),
    "plaid": lambda u, v, p: (torch.sin(u + p[0]) + torch.sin(v + p[1])) / 2,
}


@cache
def textures(size: int = 32, examples: int = 40, seed: int = 0) -> ImageData:
    """Drawn textures in two random colors: stripes, checks, dots, rings, waves, plaid, one class each.

    Each of the ``examples`` of a class has its own direction, phases, colors and wavelength (log-uniform from an
    eighth to a half of the image); every class is split as :func:`split_by_class` does. All of it follows from
    ``seed``.

    Raises ``ValueError`` for fewer than 4 ``examples``.

    >>> textures(size=16, examples=10).split("test")[0].shape
    torch.Size([12, 3, 16, 16])
    """
    generator = Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    images = []
    for pattern in _PATTERNS.values():
        angle = torch.pi * torch.rand(examples, 1, 1, generator=generator)
        frequency = 2 * torch.pi * 2 ** (1 + 2 * torch.rand(examples, 1, 1, generator=generator))
        phases = 2 * torch.pi * torch.rand(2, examples, 1, 1, generator=generator)
        u = frequency * (column * angle.cos() + row * angle.sin())
        v = frequency * (row * angle.cos() - column * angle.sin())
        share = (pattern(u, v, phases)[:, None] + 1) / 2
        colors = torch.rand(2, examples, 3, 1, 1, generator=generator)
        images.append(colors[0] * share + colors[1] * (1 - share))
    return split_by_class("textures", torch.stack(images))
