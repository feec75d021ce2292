"""Which examples make up an episode: drawn afresh, or the same ones whenever they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True, eq=False)
class EpisodeIndices:
    """Which examples make up episodes: all that needs to be known to make them again."""

    classes: Tensor
    """``(episodes, ways)``: which class each label stands for."""
    examples: Tensor
    """``(episodes, ways, shots + queries)``: places within the class; the first ``shots`` are the support."""
    shots: int

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: slice) -> EpisodeIndices:
        return EpisodeIndices(self.classes[index], self.examples[index], self.shots)

    def sha256(self) -> str:
        """Of all numbers in order, as decimal text: the same on every machine."""
        numbers = torch.cat([self.classes.flatten(), self.examples.flatten()]).tolist()
        return hashlib.sha256(f"{tuple(self.examples.shape)} {self.shots} {numbers}".encode()).hexdigest()


def draw_indices(
    counts: Sequence[int], ways: int, shots: int, queries: int, count: int, generator: Generator
) -> EpisodeIndices:
    """Draw ``count`` episodes: ``ways`` classes without repetition, of each ``shots + queries`` different examples.

    Args:
        counts: How many examples each class has; all must have enough.
    """
    # The order of random keys is a random order; sorting the keys of all episodes at once is one operation.
    keys = torch.rand(count, len(counts), generator=generator, dtype=torch.float64)
    classes = keys.topk(ways, dim=1).indices
    sizes = torch.tensor(counts)[classes]
    keys = torch.rand(count, ways, max(counts), generator=generator, dtype=torch.float64)
    keys = keys.masked_fill(torch.arange(max(counts)) >= sizes[..., None], -1.0)
    return EpisodeIndices(classes, keys.topk(shots + queries, dim=2).indices, shots)


def frozen_indices(
    name: str, counts: Sequence[int], ways: int, shots: int, queries: int, count: int, seed: int = 0
) -> EpisodeIndices:
    """The list of episodes that ``(name, ways, shots, queries, seed)`` stands for, the same for every method.

    The episodes are drawn one after the other, so that a shorter list is the beginning of a longer one.

    >>> long, short = (frozen_indices("toy/test", [20] * 50, 5, 1, 15, count) for count in (8, 3))
    >>> bool((long.classes[:3] == short.classes).all() and (long.examples[:3] == short.examples).all())
    True
    """
    generator = frozen_generator(f"{name} {ways}-way {shots}-shot {queries}-query seed {seed}", count)
    drawn = [draw_indices(counts, ways, shots, queries, 1, generator) for _ in range(count)]
    return EpisodeIndices(torch.cat([one.classes for one in drawn]), torch.cat([one.examples for one in drawn]), shots)


def frozen_generator(key: str, count: int) -> Generator:
    """What draws a list of ``count`` frozen episodes: it depends on the key alone, and no usual seed gives it."""
    if count < 1:
        raise ValueError(f"a list of frozen episodes holds at least 1, got {count}")
    return Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
