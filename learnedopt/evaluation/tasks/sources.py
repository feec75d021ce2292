"""Data that no meta-training of this project uses, as rows in three disjoint splits. None needs a download."""

from __future__ import annotations

import ast
import inspect
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Generator, Tensor

from learnedopt.data import ImageData, TextData, glyphs, photographs, scripts, textures
from learnedopt.data.text import split_text
from learnedopt.tasks.base import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Rows = dict[Split, tuple[Tensor, ...]]
"""The rows of each split: tensors that agree in their first axis."""


def shuffled(*tensors: Tensor, seed: int = 0) -> Rows:
    """Rows in three splits: 70 % for training, 15 % each for validation and testing, drawn once and for all.

    >>> {name: len(rows[0]) for name, rows in shuffled(torch.arange(100)).items()}
    {'train': 70, 'validation': 15, 'test': 15}
    """
    count = len(tensors[0])
    held_out = count * 15 // 100
    order = torch.randperm(count, generator=Generator().manual_seed(seed))
    parts = order.split([count - 2 * held_out, held_out, held_out])
    return {name: tuple(tensor[part] for tensor in tensors) for name, part in zip(SPLITS, parts)}


def by_split(make: Callable[[Split], tuple[Tensor, ...]]) -> Rows:
    """The rows that ``make`` gives for each split."""
    return {name: make(name) for name in SPLITS}


def flat_images(data: ImageData) -> Rows:
    """Images as vectors of pixels, and their classes."""
    return by_split(lambda name: (data.split(name)[0].flatten(1), data.split(name)[1]))


@cache
def letters(script: str, count: int, size: int = 12) -> ImageData:
    """The first ``count`` letters of a script, 40 renderings of each, ``size`` x ``size`` gray levels."""
    return glyphs(scripts()[script][:count], size=size)


@cache
def small_textures() -> ImageData:
    """Drawn textures of six kinds in two colors, 12 x 12."""
    return textures(size=12, examples=200)


@cache
def gray_patches(size: int = 8) -> Rows:
    """Patches of two photographs, gray levels, ``(N, 1, size, size)``; the splits share no pixel."""
    data = photographs(size)
    return by_split(lambda name: (data.split(name)[0].mean(1, keepdim=True),))


@cache
def tabular(name: Literal["breast_cancer", "wine", "diabetes"]) -> Rows:
    """A small table of scikit-learn: standardized features, and classes or a standardized target ``(N,)``.

    Raises ``ImportError`` without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("tabular() needs scikit-learn: pip install 'learnedopt[train]'") from error
    bunch = getattr(datasets, f"load_{name}")()
    x, y = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)
    if y.is_floating_point():
        y = ((y - y.mean()) / y.std()).float()
    return shuffled((x - x.mean(0)) / x.std(0).clamp(min=1e-6), y)


@cache
def character_names() -> TextData:
    """The names of Unicode's characters, a line each, in random order: about 250,000 characters of 39 kinds."""
    vocabulary = "\n -ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    names = _character_names()
    order = torch.randperm(len(names), generator=Generator().manual_seed(0))[:10_000]
    return split_text("character_names", "\n".join(names[i] for i in order.tolist()), vocabulary)


@cache
def python_code() -> TextData:
    """Two modules of Python's standard library, parsed and written again: printable ASCII. Versions differ a little."""
    vocabulary = "\n" + "".join(map(chr, range(32, 127)))
    text = "\n".join(ast.unparse(ast.parse(inspect.getsource(module))) for module in (ast, inspect))
    return split_text("python_code", "".join(c for c in text if c in set(vocabulary)), vocabulary)


@cache
def word_pairs(words: int = 300) -> Rows:
    """Neighboring words in the names of Unicode's characters, both among the ``words`` most frequent: two places."""
    sentences = [name.replace("-", " ").split() for name in _character_names()]
    counts: dict[str, int] = {}
    for word in (word for sentence in sentences for word in sentence):
        counts[word] = counts.get(word, 0) + 1
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:words]
    place = {word: i for i, word in enumerate(kept)}
    pairs = [(place[a], place[b]) for sentence in sentences for a, b in pairwise(sentence) if a in place and b in place]
    first, second = torch.tensor(pairs).unbind(1)
    return shuffled(first, second)


def _character_names() -> list[str]:
    # The blocks of letters and symbols before the ideographs: these names have not changed for years.
    names = (unicodedata.name(chr(code), "") for code in range(0x20, 0x3000))
    return [name for name in names if name]


@cache
def graphs(count: int = 2000, nodes: int = 8) -> Rows:
    """Random graphs: adjacency ``(N, nodes, nodes)``, and how many pairs of edges share a node ``(N,)``.

    Edges are independent, their density uniform in [0.1, 0.7] from graph to graph.
    """
    generator = Generator().manual_seed(0)
    density = 0.1 + 0.6 * torch.rand(count, 1, 1, generator=generator)
    upper = (torch.rand(count, nodes, nodes, generator=generator) < density).float().triu(1)
    adjacency = upper + upper.transpose(1, 2)
    degree = adjacency.sum(1)
    return shuffled(adjacency, (degree * (degree - 1) / 2).sum(1))


@cache
def pixels(size: int = 48) -> Rows:
    """A photograph as a function: coordinates in [-1, 1]² and colors in [-1, 1]³ of its pixels."""
    tile = photographs(size).train[0][0]
    axis = torch.linspace(-1, 1, size)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    return shuffled(places, 2 * tile.flatten(1).T - 1)


@cache
def chaotic_series(length: int = 24, count: int = 2000) -> Rows:
    """Windows of the Mackey-Glass equation, ``(N, length + 1)``, of mean 0 and variance 1; three separate stretches.

    :math:`x' = 0.2\\,x(t - 17) / (1 + x(t - 17)^{10}) - 0.1\\,x`, Euler steps of 1, every third kept.

    Source: Mackey & Glass, *Oscillation and chaos in physiological control systems*, 1977.
    """
    past, values = [1.2] * 18, []
    for _ in range(3 * (count + length) + 300):
        delayed = past[-18]
        past.append(past[-1] + 0.2 * delayed / (1 + delayed**10) - 0.1 * past[-1])
        values.append(past[-1])
    series = torch.tensor(values[300::3])
    windows = ((series - series.mean()) / series.std()).unfold(0, length + 1, 1)
    held_out = len(windows) * 15 // 100
    parts = windows.split([len(windows) - 2 * held_out, held_out, held_out])
    # Windows that reach into the next stretch are left out.
    return {name: (part[: len(part) - length],) for name, part in zip(SPLITS, parts)}


@cache
def waveforms(count: int = 1800, length: int = 32) -> Rows:
    """Noisy sines, squares and sawteeth of random frequency and phase: ``(N, length)`` and which of the three."""
    generator = Generator().manual_seed(0)
    frequency = 1.5 + 2.5 * torch.rand(count, 1, generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    turn = torch.arange(length) / length * frequency + phase
    y = torch.arange(count) % 3
    sine = torch.sin(2 * torch.pi * turn)
    shapes = torch.stack([sine, sine.sign(), 2 * (turn - turn.floor()) - 1])
    x = shapes[y, torch.arange(count)] + 0.5 * torch.randn(count, length, generator=generator)
    return shuffled(x, y)
