"""The default's whole step in one call of the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from learnedopt.kernels.core import extension, native
from learnedopt.kernels.core.base import StepOptions, Tensors
from learnedopt.rules import ChainRule, InEigenbases, LawsRule, NormalizedGradientRule, State
from learnedopt.rules.coordinates import AGE, as_matrix
from learnedopt.rules.eigenbasis import Eigenbases
from learnedopt.rules.laws import Law

_COORDINATES = ("square", "offset", "origin")
_SCALARS = ("step", "smallness", "peak", "slope", "steepness", "distance")
_NO_SIDES = (0, 0, 0, 0, 0, 0)


class Settings(NamedTuple):
    """Named as in the configurations of the three rules."""

    square_decay: float
    eps: float
    relative_eps: float
    way_decay: float
    way_gain: float
    usual_scale: float
    warmup: float
    nominal_step: float
    interpolation: float
    settling_time: float
    settling_power: float
    averaging_power: float
    log_step_bound: float
    log_averaging_bound: float
    max_time: float
    schedule_power: float
    factor_decay: float = 0.0
    settling: float = 1.0
    interval: float = 1.0
    factor_interval: float = 1.0
    shift: float = 0.0
    threshold: float = 0.0


class Program(native.Program):
    """A chain as ``native.h`` takes it. It is no backend's program: :func:`step` runs it."""

    settings_type = Settings

    def __init__(self, rule: ChainRule) -> None:
        direction, then = rule.first, rule.then
        self.bases: Eigenbases | None = None
        found: dict[str, object] = {}
        if isinstance(direction, InEigenbases):
            self.bases = direction.coordinates
            found.update(vars(direction.config))
            direction = direction.inner
        assert isinstance(then, LawsRule)
        found |= {**vars(direction.config), **vars(then.config)}
        settings = [found.get(name, Settings._field_defaults.get(name)) for name in Settings._fields]
        super().__init__(None, [torch.cat([then.step_size, then.averaging])], settings)  # type: ignore[arg-type]

    @classmethod
    def declarations(cls) -> Iterator[str]:
        yield from super().declarations()
        members = ", ".join(f"{member} = {int(value)}" for member, value in Law.__members__.items())
        yield f"enum {{ {members}, NUM_LAWS = {len(Law)} }};"


_PROGRAMS: WeakKeyDictionary[ChainRule, Program] = WeakKeyDictionary()


def serves(rule: ChainRule) -> bool:
    """Whether it is made of what ``native.h`` has."""
    first = rule.first
    if type(first) is InEigenbases:
        first = first.inner
    return type(first) is NormalizedGradientRule and type(rule.then) is LawsRule


def step(rule: ChainRule, tensors: Tensors, options: StepOptions) -> list[int]:
    """A step of the tensors whose gradients have squares in float32; which have none, and have not moved."""
    program = _PROGRAMS.get(rule)
    if program is None:
        program = _PROGRAMS[rule] = Program(rule)
    own: list[Tensor] = []
    sides: list[tuple[int, ...]] = []
    for param, state in zip(tensors.params, tensors.states):
        if AGE not in state:
            sides.append(_NO_SIDES)
            continue
        assert program.bases is not None
        own.append(state[AGE])
        own += [state[name] for name in _own_names(state)]
        sides.append(_sides(program.bases, param.shape))
    names = _COORDINATES + _SCALARS
    # What is not in order in memory, or not in float32, is copied: all tensors take one way, whatever their layout.
    params = [param.to(torch.float32).contiguous() for param in tensors.params]
    grads = [grad.to(torch.float32).contiguous() for grad in tensors.grads]
    if tensors.maximize:
        grads = [-grad for grad in grads]
    left: list[int] = extension.operators().chain_step.default(
        params,
        grads,
        [state[name] for state in tensors.states for name in names],
        own,
        list(chain.from_iterable(sides)),
        program.weights[0],
        program.settings,
        float(options.lr),
        options.weight_decay,
        tensors.num_together,
    )
    if options.lr:
        for index, (param, moved) in enumerate(zip(tensors.params, params)):
            if moved is not param and index not in left:
                param.copy_(moved)
    return left


def _own_names(state: State) -> Iterator[str]:
    for side in ("left", "right"):
        if f"{side}_factor" in state:
            yield from (f"{side}_factor", f"{side}_basis")


@lru_cache(maxsize=4096)
def _sides(bases: Eigenbases, shape: torch.Size) -> tuple[int, ...]:
    found = bases.sides(shape)
    return (*as_matrix(shape), *found.get("left", (0, 0)), *found.get("right", (0, 0)))
