"""Episodes: small learning problems, each with a support set to learn from and a query set to be judged on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
"""Of a data set."""


@dataclass(frozen=True, eq=False)
class Episodes:
    """A batch of E episodes; the leading axis is there for a single one too.

    Classification: labels are int64 in [0, ``ways``), every class occurs in support and query. Examples drawn by this
    package are ordered by class. Regression: ``ways`` is ``None`` and the targets are floats.

    Raises ``ValueError`` for no episodes or examples, shapes that do not belong together, labels outside their range,
    classes without support, support and query that differ in their ways, and targets of regression that are not
    floating.

    >>> x, y = torch.zeros(1, 4, 3), torch.tensor([[0, 0, 1, 1]])
    >>> episodes = Episodes(x, y, x, y, ways=2)
    >>> len(episodes), episodes.example_shape
    (1, (3,))
    >>> Episodes(x, y, x, y + 1, ways=2)
    Traceback (most recent call last):
    ValueError: the query labels run from 1 to 2, and with 2 ways they must lie from 0 to 1: number ...
    """

    support_x: Tensor
    """``(E, support examples, *example)``, floating."""
    support_y: Tensor
    """``(E, support examples)`` int64, or ``(E, support examples, outputs)`` floating."""
    query_x: Tensor
    """``(E, query examples, *example)``."""
    query_y: Tensor
    """As ``support_y``."""
    ways: int | None
    """Number of classes; ``None`` for regression."""

    def __post_init__(self) -> None:
        for part, x, y in (("support", self.support_x, self.support_y), ("query", self.query_x, self.query_y)):
            if x.ndim < 2 or y.ndim < 2 or x.shape[:2] != y.shape[:2]:
                raise ValueError(
                    f"{part}_x and {part}_y must both begin with (episodes, examples), got {tuple(x.shape)} and "
                    f"{tuple(y.shape)}; a single episode needs x[None]"
                )
            if x.shape[0] == 0 or x.shape[1] == 0:
                raise ValueError(f"{part}_x has shape {tuple(x.shape)}: there must be episodes, and examples in each")
        if len(self.support_x) != len(self.query_x) or self.example_shape != tuple(self.query_x.shape[2:]):
            raise ValueError(
                f"support_x {tuple(self.support_x.shape)} and query_x {tuple(self.query_x.shape)} must agree in the "
                "number of episodes and in the shape of an example"
            )
        if self.ways is not None:
            check_labels("support", self.support_y, self.ways)
            check_labels("query", self.query_y, self.ways)
            missing = _missing(self.support_y, self.ways), _missing(self.query_y, self.ways)
            if missing[0] or missing[1]:
                kind = (
                    "support and query must have the same ways" if missing[0] != missing[1] else "classes are missing"
                )
                raise ValueError(
                    f"{kind}: of {self.ways} classes the support lacks {missing[0]} and the query {missing[1]} in some "
                    "episode; give each class at least one example in both, or lower ways"
                )
            return
        for part, y in (("support", self.support_y), ("query", self.query_y)):
            if not y.is_floating_point() or y.ndim != 3 or y.shape[2] != self.support_y.shape[2]:
                raise ValueError(
                    "without ways, targets must be floating, (episodes, examples, outputs), with as many outputs in "
                    f"support and query; {part}_y is {y.dtype} {tuple(y.shape)}"
                )

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example, without any batch axis."""
        return tuple(self.support_x.shape[2:])

    def __len__(self) -> int:
        return len(self.support_x)

    def __getitem__(self, index: int | slice) -> Episodes:
        """Some of the episodes; an index gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"episode {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        return Episodes(
            self.support_x[index], self.support_y[index], self.query_x[index], self.query_y[index], self.ways
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Episodes:
        """On another device, or with floating tensors of another type; labels stay int64."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return Episodes(
            moved(self.support_x), moved(self.support_y), moved(self.query_x), moved(self.query_y), self.ways
        )

    def batches(self, size: int) -> Iterator[Episodes]:
        """The episodes in order, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))


def check_labels(part: str, labels: Tensor, ways: int) -> None:
    """Raise ``ValueError`` unless ``labels`` are int64 in [0, ``ways``); ``part`` names them in the message."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"the {part} labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64 or labels.ndim != 2:
        advice = "convert with .long()" if labels.ndim == 2 else "number the classes (of one-hot labels, .argmax(-1))"
        raise ValueError(
            f"the {part} labels must be int64 of shape (episodes, examples), got {labels.dtype} "
            f"{tuple(labels.shape)}: {advice}"
        )
    if labels.numel() == 0:
        raise ValueError(f"the {part} set is empty: an episode needs at least one example of every class")
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= ways:
        raise ValueError(
            f"the {part} labels run from {low} to {high}, and with {ways} ways they must lie from 0 to {ways - 1}: "
            "number the classes of every episode from 0"
        )


def _missing(labels: Tensor, ways: int) -> list[int]:
    """Classes without any example, in some episode."""
    present = torch.zeros(len(labels), ways, dtype=torch.bool, device=labels.device).scatter_(1, labels, True)
    return [] if bool(present.all()) else (~present).any(0).nonzero().flatten().tolist()


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
    _check_frozen_count(count)
    key = f"{name} {ways}-way {shots}-shot {queries}-query seed {seed}"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = Generator().manual_seed(number)
    drawn = [draw_indices(counts, ways, shots, queries, 1, generator) for _ in range(count)]
    return EpisodeIndices(torch.cat([one.classes for one in drawn]), torch.cat([one.examples for one in drawn]), shots)


def _check_frozen_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"a list of frozen episodes holds at least 1, got {count}")


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
        _check_frozen_count(count)
        # Hashed, so that no list is what a generator with a usual seed draws for training.
        hashed = int.from_bytes(hashlib.sha256(f"sinusoid {self.part} {seed}".encode()).digest()[:7])
        generator = Generator().manual_seed(hashed)
        drawn = [self.sample(1, generator) for _ in range(count)]
        return Episodes(
            torch.cat([one.support_x for one in drawn]),
            torch.cat([one.support_y for one in drawn]),
            torch.cat([one.query_x for one in drawn]),
            torch.cat([one.query_y for one in drawn]),
            ways=None,
        )

    def _draw(self, count: int, points: int, generator: Generator) -> tuple[Tensor, Tensor]:
        amplitude, phase = torch.rand(2, count, 1, 1, generator=generator)
        x = 10 * torch.rand(count, points, 1, generator=generator) - 5
        return x, (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)
