"""What a backend is: one implementation of a rule's step, in place, on many tensors of one device.

The rule is the reference; every backend computes the same, up to rounding, and is checked against it. A step is two
calls, as in :class:`~learnedopt.rules.UpdateRule`: :meth:`Backend.statistics` looks at whole tensors, then
:meth:`Backend.update` moves parameters and advances state, each coordinate by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from learnedopt.kernels.core.state import StateDtype
from learnedopt.rules.base import Segments, State, UpdateRule


@dataclass(frozen=True)
class Case:
    """What a backend is asked whether it can serve."""

    rule: UpdateRule
    device: torch.device
    dtype: torch.dtype
    """What is computed in, and the rule's dtype: float32, or float64."""
    state_dtype: StateDtype


@dataclass(frozen=True)
class Tensors:
    """What a step works on: plain tensors of one device, the shards of this process where they are sharded."""

    params: Sequence[Tensor]
    """Real, of any shape, strides and floating-point dtype that is not wider than ``dtype``."""
    grads: Sequence[Tensor]
    """Each of its parameter's shape, with its own strides and dtype. Never written."""
    states: Sequence[State]
    """Per parameter, contiguous, in the layout and the dtypes of :func:`~learnedopt.kernels.core.state.state_layout`:
    ``(*shape, *param.shape)`` for what every coordinate has, ``shape`` for what the tensor has."""
    dtype: torch.dtype
    """What to compute in: float32 or float64."""
    state_dtype: StateDtype
    counts: Sequence[int]
    """The numbers of coordinates of the tensors; larger than their ``numel()`` where these are shards."""
    total: Callable[[Tensor], Tensor] | None = None
    """Where tensors are sharded, adds up the sums ``(..., S)`` of all processes. Each must call it equally often, with
    the same tensors, however little it holds of them."""
    maximize: bool = False
    """Whether the rule is given the negative gradients."""
    own_grads: Sequence[Tensor] | None = None
    """The gradients in the tensors' own coordinates, as ``params`` are, where ``grads`` are in bases."""
    dims: Sequence[int] | None = None
    """How many dimensions each tensor has for its owner, where complex numbers are pairs of reals here."""
    together: int | None = None
    """How many tensors, of those that are not empty, are trained together; ``None`` if these are all."""

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def num_together(self) -> int:
        return sum(count > 0 for count in self.counts) if self.together is None else self.together

    @property
    def segments(self) -> Segments:
        """Which tensor each coordinate belongs to, all tensors side by side."""
        sizes = [param.numel() for param in self.params]
        shapes = [param.shape for param in self.params]
        if self.total is None:
            segments = Segments(sizes, shapes=shapes)
        else:
            segments = _ShardedSegments(sizes, shapes, self.counts, self.total)
        segments.together = self.num_together
        return segments

    def select(self, indices: Sequence[int]) -> Tensors:
        """Some of the tensors."""
        return replace(
            self,
            params=[self.params[index] for index in indices],
            grads=[self.grads[index] for index in indices],
            states=[self.states[index] for index in indices],
            counts=[self.counts[index] for index in indices],
            own_grads=None if self.own_grads is None else [self.own_grads[index] for index in indices],
            dims=None if self.dims is None else [self.dims[index] for index in indices],
            together=self.num_together,
        )


@dataclass(frozen=True)
class StepOptions:
    """What a step is taken with."""

    lr: float | Tensor = 1.0
    """A tensor is 0-d and on the tensors' device."""
    weight_decay: float = 0.0
    loss: Tensor | None = None
    """The training loss, 0-d and on the tensors' device; for rules with ``needs_loss``."""
    skip: Tensor | None = None
    """Where true, everything stays as it is bit for bit. 0-d, boolean and on the tensors' device."""


class _ShardedSegments(Segments):
    """Segments of which this process holds ``sizes`` coordinates, and all processes ``counts``."""

    def __init__(
        self,
        sizes: Sequence[int],
        shapes: Sequence[Sequence[int]],
        counts: Sequence[int],
        total: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(sizes, shapes=shapes)
        self.counts = tuple(counts)
        self._total = total

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each tensor, all shards of it: ``(..., N) -> (..., S)``."""
        return self._total(super().sum(x))


class Backend(ABC):
    """One implementation of a step."""

    name: ClassVar[str]
    """By which it is asked for."""

    @abstractmethod
    def refusal(self, case: Case) -> str | None:
        """Why it cannot serve a case, as the end of a sentence; ``None`` where it can. Compiles nothing."""

    def unprepared(self) -> str | None:
        """Why it is not taken unless it is asked for by name, as the end of a sentence; ``None`` where it is ready.

        It may begin to make itself ready for later, but waits for nothing.
        """
        return None

    def prepare(self) -> None:  # noqa: B027, most have nothing to prepare
        """Make it ready; called once it has been asked for by name, and may take long.

        Raises:
            RuntimeError: it cannot be made ready; the message says why.
        """

    @abstractmethod
    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        """What the rule needs to know about whole tensors, before :meth:`update` changes anything.

        Args:
            loss: As in :class:`StepOptions`.

        Returns:
            ``(K, S)`` numbers in ``tensors.dtype`` as of :meth:`UpdateRule.statistics`, and the new tensor-scope state,
            ``(*shape, S)``, which the caller writes.
        """

    @abstractmethod
    def update(self, rule: UpdateRule, tensors: Tensors, statistics: Tensor, options: StepOptions) -> None:
        r"""Move the parameters and advance the coordinate-scope state by one step, in place.

        .. math::
            \theta \leftarrow (1 - \eta\lambda)\,\theta + \eta\, \Delta(\theta, g)

        with :math:`\eta` = ``lr`` and :math:`\lambda` = ``weight_decay``. Everything is computed in ``tensors.dtype``
        and each parameter rounded to its own dtype once, at the end. At ``lr=0`` parameters stay as they are bit for
        bit, even if the update is not finite, while state advances. Entries that start at the parameters stay.

        Args:
            rule: Frozen, in ``tensors.dtype``, on the tensors' device. Its weights never change, so that what a
                backend makes of them may be kept for as long as the rule lives.
            statistics: ``(K, S)``, from :meth:`statistics`.
            options: On the CPU ``lr`` is always a number and ``skip`` always ``None``. Else the host reads neither
                tensor.
        """
