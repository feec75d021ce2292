"""What episodes are drawn from: classes of images, or a family of functions."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.sampling import EpisodeIndices, draw_indices, frozen_generator, frozen_indices

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
"""Of a data set."""


class EpisodeSource(ABC):
    """What episodes are drawn from: classes of images, or a family of functions."""

    ways: int | None
    """Classes in an episode; ``None`` for regression."""

    @property
    @abstractmethod
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Classes there are to draw from, what a classifier of all of them must tell apart; ``None`` for regression."""

    @abstractmethod
    def sample(self, count: int, generator: Generator) -> Episodes:
        """Draw ``count`` episodes."""

    @abstractmethod
    def labelled(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw ``count`` single examples for supervised pretraining, with replacement.

        ``(count, *example)`` and their classes, int64 ``(count,)`` in [0, ``num_classes``); for regression the targets,
        ``(count, outputs)``.
        """

    @abstractmethod
    def frozen(self, count: int, seed: int = 0) -> EpisodeList | Episodes:
        """The same ``count`` episodes whenever asked, a shorter list is the beginning of a longer."""


@dataclass(frozen=True, eq=False)
class TrainingSource:
    """What a learner may draw from while it is trained, and how much of it in one step."""

    source: EpisodeSource
    episodes_per_step: int = 1
    """Episodes whose losses are averaged for one update (the *meta-batch*)."""
    device: torch.device | str = "cpu"
    """Where to put what was drawn."""

    def episodes(self, generator: Generator) -> Episodes:
        """Fresh episodes for one step."""
        return self.source.sample(self.episodes_per_step, generator).to(self.device)

    def labelled(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """As :meth:`EpisodeSource.labelled`."""
        x, y = self.source.labelled(count, generator)
        return x.to(self.device), y.to(self.device)


@dataclass(frozen=True, eq=False)
class ClassSet:
    """The examples of one split, grouped by class.

    Raises ``ValueError`` if counts and images disagree, images are neither uint8 nor floating, or a name occurs twice.

    >>> classes = ClassSet("toy", ("a", "b"), torch.zeros(5, 1, 4, 4, dtype=torch.uint8), (2, 3))
    >>> len(classes), classes.example_shape
    (2, (1, 4, 4))
    """

    name: str
    """Data set and split, e.g. ``omniglot-vinyals/test``; part of what determines frozen episodes."""
    names: tuple[str, ...]
    """One name per class."""
    images: Tensor = field(repr=False)
    """``(examples, *example)``, class after class; uint8 (divided by 255 when drawn) or floating (as it is)."""
    counts: tuple[int, ...] = field(repr=False)
    """Examples of each class."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 and not self.images.is_floating_point():
            raise ValueError(f"{self.name}: images must be uint8 or floating, got {self.images.dtype}")
        if any(count < 0 for count in self.counts):
            raise ValueError(f"{self.name}: a class has {min(self.counts)} examples")
        if len(self.names) != len(self.counts) or sum(self.counts) != len(self.images):
            raise ValueError(
                f"{self.name}: {len(self.names)} names, {len(self.counts)} counts of {sum(self.counts)} examples, and "
                f"{len(self.images)} images do not belong together"
            )
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"{self.name}: the class {twice[0]!r} occurs more than once; every class needs one name")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.images.shape[1:])

    @property
    def offsets(self) -> Tensor:
        """Where each class begins in ``images``."""
        counts = torch.tensor(self.counts)
        return counts.cumsum(0) - counts

    def gather(self, index: Tensor) -> Tensor:
        """Examples by their place in ``images``, floating."""
        images = self.images[index.to(self.images.device)]
        return images.float().div_(255) if images.dtype == torch.uint8 else images

    def to(self, device: torch.device | str) -> ClassSet:
        """With the images on another device: episodes are then gathered there."""
        return dataclasses.replace(self, images=self.images.to(device))


@dataclass(frozen=True, eq=False)
class FewShotTask(EpisodeSource):
    """N-way K-shot classification: draws episodes from the classes of one split.

    Raises ``ValueError`` if there are fewer classes than ``ways``, or a class has fewer than ``shots + queries``
    examples.

    >>> images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
    >>> task = FewShotTask(ClassSet("toy/train", tuple("abcd"), images, (10,) * 4), ways=3, shots=2, queries=5)
    >>> episodes = task.sample(7, torch.Generator().manual_seed(0))
    >>> episodes.support_x.shape, episodes.support_y[0], episodes.query_x.shape
    (torch.Size([7, 6, 1, 1, 1]), tensor([0, 0, 1, 1, 2, 2]), torch.Size([7, 15, 1, 1, 1]))
    """

    classes: ClassSet
    ways: int = 5
    shots: int = 1
    """Support examples of each class."""
    queries: int = 15
    """Query examples of each class."""

    def __post_init__(self) -> None:
        if min(self.ways, self.shots, self.queries) < 1:
            raise ValueError(f"ways, shots and queries must be at least 1, got {self.ways, self.shots, self.queries}")
        if self.ways > len(self.classes):
            raise ValueError(
                f"{self.classes.name} has {len(self.classes)} classes, too few for {self.ways} ways: lower ways"
            )
        needed = self.shots + self.queries
        for name, count in zip(self.classes.names, self.classes.counts):
            if count < needed:
                raise ValueError(
                    f"the class {name!r} of {self.classes.name} has {count} examples, and {self.shots} shots with "
                    f"{self.queries} queries need {needed}: lower one of them, or leave the class out"
                )

    @property
    def example_shape(self) -> tuple[int, ...]:
        return self.classes.example_shape

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def sample(self, count: int, generator: Generator) -> Episodes:
        return self.gather(draw_indices(self.classes.counts, self.ways, self.shots, self.queries, count, generator))

    def labelled(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(self.classes), (count,), generator=generator)
        counts = torch.tensor(self.classes.counts)[labels]
        place = (torch.rand(count, generator=generator, dtype=torch.float64) * counts).long()
        x = self.classes.gather(self.classes.offsets[labels] + place)
        return x, labels.to(x.device)

    def frozen(self, count: int, seed: int = 0) -> EpisodeList:
        indices = frozen_indices(
            self.classes.name, self.classes.counts, self.ways, self.shots, self.queries, count, seed
        )
        return EpisodeList(self, indices)

    def gather(self, indices: EpisodeIndices) -> Episodes:
        """The episodes that the indices stand for."""
        places = self.classes.offsets[indices.classes][..., None] + indices.examples
        support, query = places[..., : indices.shots], places[..., indices.shots :]
        labels = torch.arange(self.ways)[:, None]

        def part(places: Tensor) -> tuple[Tensor, Tensor]:
            x = self.classes.gather(places.flatten(1))
            return x, labels.expand(*places.shape).flatten(1).to(x.device)

        return Episodes(*part(support), *part(query), ways=self.ways)


@dataclass(frozen=True, eq=False)
class EpisodeList:
    """A list of episodes kept as indices; images are gathered batch by batch."""

    task: FewShotTask
    indices: EpisodeIndices

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int) -> Iterator[Episodes]:
        """The episodes in order, ``size`` at a time."""
        return (self.task.gather(self.indices[start : start + size]) for start in range(0, len(self), size))


@dataclass(frozen=True)
class Sinusoid(EpisodeSource):
    """Regression on sine waves of random amplitude and phase, ``y = A sin(x - φ)`` with x uniform in [-5, 5].

    A is uniform in [0.1, 5] and φ in [0, π]. Source: Finn et al. 2017 (arXiv:1703.03400), section 5.1.

    >>> episodes = Sinusoid(shots=5, queries=10).sample(3, torch.Generator().manual_seed(0))
    >>> episodes.support_x.shape, episodes.query_y.shape, episodes.ways
    (torch.Size([3, 5, 1]), torch.Size([3, 10, 1]), None)
    """

    shots: int = 10
    queries: int = 10
    part: Part = "test"
    """Of frozen episodes: those of the three have no wave in common, nor with what a usual seed draws."""

    ways = None
    num_classes = None

    def __post_init__(self) -> None:
        if min(self.shots, self.queries) < 1:
            raise ValueError(f"shots and queries must be at least 1, got {self.shots, self.queries}")
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {self.part!r}")

    @property
    def example_shape(self) -> tuple[int, ...]:
        return (1,)

    def sample(self, count: int, generator: Generator) -> Episodes:
        x, y = self._draw(count, self.shots + self.queries, generator)
        k = self.shots
        return Episodes(x[:, :k], y[:, :k], x[:, k:], y[:, k:], ways=None)

    def labelled(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Single points, each of a wave of its own."""
        x, y = self._draw(count, 1, generator)
        return x[:, 0], y[:, 0]

    def frozen(self, count: int, seed: int = 0) -> Episodes:
        generator = frozen_generator(f"sinusoid {self.part} {seed}", count)
        drawn = [self.sample(1, generator).tensors for _ in range(count)]
        support_x, support_y, query_x, query_y = map(torch.cat, zip(*drawn))
        return Episodes(support_x, support_y, query_x, query_y, ways=None)

    def _draw(self, count: int, points: int, generator: Generator) -> tuple[Tensor, Tensor]:
        amplitude, phase = torch.rand(2, count, 1, 1, generator=generator)
        x = 10 * torch.rand(count, points, 1, generator=generator) - 5
        return x, (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)
