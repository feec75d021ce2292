"""Episodes: small learning problems, each with a support set to learn from and a query set to be judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


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
            missing = missing_classes(self.support_y, self.ways), missing_classes(self.query_y, self.ways)
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

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four, in order."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    def __getitem__(self, index: int | slice) -> Episodes:
        """Some of the episodes; an index gives a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"episode {index} of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Episodes:
        """On another device, or with floating tensors of another type; labels stay int64."""

        return self._each(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Episodes:
        support_x, support_y, query_x, query_y = map(change, self.tensors)
        return Episodes(support_x, support_y, query_x, query_y, self.ways)

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


def missing_classes(labels: Tensor, ways: int) -> list[int]:
    """Classes without any example, in some episode."""
    present = torch.zeros(len(labels), ways, dtype=torch.bool, device=labels.device).scatter_(1, labels, True)
    return [] if bool(present.all()) else (~present).any(0).nonzero().flatten().tolist()
