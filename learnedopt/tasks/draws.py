"""The few distributions that task families draw from. A range is ``(low, high)``, both ends included."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor

T = TypeVar("T")
Range = tuple[float, float]
IntRange = tuple[int, int]


def choice(generator: Generator, options: Sequence[T]) -> T:
    """One of the options, each equally likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def check_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise ``ValueError`` if any of ``names`` is not among the ``known``."""
    if unknown := sorted(set(names).difference(known)):
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}")


def uniform(generator: Generator, bounds: Range) -> float:
    """A number spread evenly over the range."""
    low, high = _ordered(bounds)
    return low + (high - low) * float(torch.rand((), generator=generator))


def log_uniform(generator: Generator, bounds: Range) -> float:
    """A positive number whose logarithm is spread evenly."""
    return math.exp(uniform(generator, _logarithms(bounds)))


def uniform_tensor(generator: Generator, bounds: Range, shape: Sequence[int]) -> Tensor:
    """As :func:`uniform`, one number per element."""
    low, high = _ordered(bounds)
    return torch.rand(tuple(shape), generator=generator).mul(high - low).add(low)


def log_uniform_tensor(generator: Generator, bounds: Range, shape: Sequence[int]) -> Tensor:
    """As :func:`log_uniform`, one number per element."""
    return uniform_tensor(generator, _logarithms(bounds), shape).exp()


def integer(generator: Generator, bounds: IntRange) -> int:
    """A whole number, each equally likely."""
    low, high = _ordered(bounds)
    return int(torch.randint(int(low), int(high) + 1, (), generator=generator))


def log_integer(generator: Generator, bounds: IntRange) -> int:
    """A whole number for a size: small ones are as likely, octave by octave, as large ones."""
    return min(int(log_uniform(generator, (bounds[0], bounds[1] + 1))), bounds[1])


def minibatch(generator: Generator, copies: int, size: int, *data: Tensor) -> tuple[Tensor, ...]:
    """The same ``size`` random rows of every tensor, drawn with replacement for each copy: ``(copies, size, ...)``."""
    rows = torch.randint(len(data[0]), (copies, size), generator=generator)
    return tuple(tensor[rows] for tensor in data)


def _ordered(bounds: Range) -> Range:
    low, high = bounds
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"a range is (low, high) with low <= high, both finite; got {bounds}")
    return low, high


def _logarithms(bounds: Range) -> Range:
    low, high = _ordered(bounds)
    if low <= 0:
        raise ValueError(f"a range on a logarithmic scale must be positive, got {bounds}")
    return math.log(low), math.log(high)
