"""One task under every setting of a generation of :class:`~learnedopt.meta.Search`, a step at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learnedopt.meta.evolution import PerCopy, Repeated
from learnedopt.meta.unroll import start_episode, unroll
from learnedopt.rules import UpdateRule
from learnedopt.tasks.base import TaskFamily

_TENSORS = ("theta", "loss", "grad", "initial_loss")


class Trial:
    """A task drawn from a family, trained in ``copies`` copies under each setting: same start, same batches.

    Args:
        rule: Whose weights differ between settings.
        family: What the task is drawn from.
        weights: All meta-parameters of each setting, ``(settings, P)``.
        copies: Of the task, for each setting.
        seed: Of task, start and batches.
        saved: What :meth:`state_dict` of a trial with the same arguments gave, to go on from there exactly.
    """

    def __init__(
        self,
        rule: UpdateRule,
        family: TaskFamily,
        weights: Tensor,
        copies: int,
        seed: int,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._settings, self._copies = len(weights), copies
        self._generator = torch.Generator().manual_seed(seed)
        self._rule = PerCopy(rule, weights.repeat_interleave(copies, 0))
        task = Repeated(family.draw(self._generator, copies), len(weights))
        with torch.no_grad():
            self._episode = start_episode(rule, task, self._generator)
        self._losses: list[Tensor] = []
        if saved is not None:
            tensors = {name: saved[name].to(weights) for name in _TENSORS}
            before = self._episode.state
            state = {name: value.to(before[name]) for name, value in saved["state"].items()}
            self._episode = replace(self._episode, **tensors, state=state, step=len(saved["losses"]))
            self._losses = list(saved["losses"].to(weights).unbind())
            self._generator.set_state(saved["generator"])

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self._losses)

    def step(self) -> None:
        """One step of every copy."""
        with torch.no_grad():
            losses, self._episode = unroll(self._rule, self._episode, 1, self._generator)
        self._losses.append(losses[0])

    def curves(self) -> NDArray[np.float64]:
        """The loss after each step, ``(steps, settings)``, averaged over copies."""
        losses = torch.stack(self._losses).unflatten(1, (self._settings, self._copies)).mean(2)
        curves: NDArray[np.float64] = losses.double().cpu().numpy()
        return curves

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly; on the CPU."""
        episode = self._episode
        return {
            **{name: getattr(episode, name).cpu() for name in _TENSORS},
            "state": {name: value.cpu() for name, value in episode.state.items()},
            "losses": torch.stack(self._losses).cpu() if self._losses else torch.empty(0, len(episode.theta)),
            "generator": self._generator.get_state(),
        }
