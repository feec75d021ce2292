"""Which parameters are worked on together, where they are, and what computes their step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from learnedopt.kernels import (
    Backend,
    BackendName,
    Case,
    Tensors,
    check_name,
    choose,
    get_backend,
)
from learnedopt.optim.options import Group
from learnedopt.optim.registry import RuleRegistry
from learnedopt.optim.sharding import Spread, align, has_values, keep_whole, local, most_over, spread, total_over, whole
from learnedopt.optim.state import as_real, has_coordinates, init_state
from learnedopt.rules import State, UpdateRule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Backends:
    """The choice of an optimizer: made once for each case, and the same in all processes that share parameters.

    Args:
        asked: ``"auto"``, or the name of a backend.
    """

    def __init__(self, asked: BackendName) -> None:
        check_name(asked)
        self._asked = asked
        self._chosen: dict[Case, Backend] = {}
        self._agreed: dict[tuple[Case, DeviceMesh | None], Backend] = {}

    def cases(self, group: Group, rules: RuleRegistry) -> list[tuple[Case, DeviceMesh | None]]:
        """What a group asks of backends, and for tensors spread over which processes."""
        sha256 = group["rule_sha256"]
        places = []
        for param in group["params"]:
            dtype = rules.dtype(sha256, param.dtype.to_real())
            rule = rules.placed(sha256, param.device, dtype)
            places.append((Case(rule, param.device, dtype, group["state_dtype"]), _mesh(spread(param))))
        return list(dict.fromkeys(places))

    def names(self, groups: list[Group], rules: RuleRegistry) -> str:
        """What computes the step of all groups; for each device if that differs."""
        cases = [case for group in groups for case in self.cases(group, rules)]
        chosen = dict.fromkeys((case.device, self.choose(case, mesh).name) for case, mesh in cases)
        names = {name for _, name in chosen}
        if len(names) == 1:
            return names.pop()
        return ", ".join(f"{name} on {device}" for device, name in chosen)

    def place(self, group: Group, rules: RuleRegistry) -> None:
        """Copy the rule to where a group's parameters are: now, as a copy cannot be part of a compiled step.

        And say now if the backend that was asked for cannot serve; of parameters that are nowhere yet, later.
        """
        for case, _ in self.cases(group, rules):
            if case.device.type != "meta":
                self.choose(case)

    def choose(self, case: Case, mesh: DeviceMesh | None = None) -> Backend:
        """Chosen once: a step does not change because something was compiled in the meantime."""
        if (case, mesh) in self._agreed:
            return self._agreed[case, mesh]
        if case not in self._chosen:
            self._chosen[case], _ = choose(case, self._asked)
        return self._chosen[case]

    def agree(self, case: Case, mesh: DeviceMesh | None) -> Backend:
        """The choice for tensors that are spread over processes: the same in all of them.

        Each chooses by what is compiled on its own disk, and together they take the slowest of their choices. They are
        asked in their first step, where all of them are.
        """
        backend = self.choose(case, mesh)
        settled = self._asked != "auto" or (case, mesh) in self._agreed
        if mesh is None or settled:
            return backend
        names = get_args(BackendName)  # the fastest first
        slowest = most_over(mesh, names.index(backend.name), case.device)
        self._agreed[case, mesh] = get_backend(names[slowest])
        return self._agreed[case, mesh]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chosen": {}, "_agreed": {}}


@dataclass
class Batch:
    """Parameters of a group that are worked on together: of one device, dtype and sharding."""

    rule: UpdateRule
    dtype: torch.dtype
    layout: Spread | None
    gathered: bool
    """Whether every process works on whole tensors: what is in bases mixes rows and columns that others may hold."""
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    dims: list[int]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def has_values(self) -> bool:
        """Whether there is anything to compute with: fake tensors have shapes alone, and so do those on ``meta``."""
        return all(has_values(tensor) for tensor in (*self.params, *self.grads))

    @property
    def mesh(self) -> DeviceMesh | None:
        return _mesh(self.layout)

    def tensors(self, group: Group, together: int) -> Tensors:
        """What a backend is given."""
        params, grads, states = self.params, self.grads, self.states
        if self.layout is not None:
            here = whole if self.gathered else local
            params, grads = [here(param) for param in params], [here(grad) for grad in grads]
            states = [{name: here(values) for name, values in state.items()} for state in states]
        return Tensors(
            params,
            grads,
            states,
            dtype=self.dtype,
            state_dtype=group["state_dtype"],
            counts=[param.numel() for param in self.params],
            total=None if self.layout is None or self.gathered else total_over(self.layout),
            maximize=group["maximize"],
            dims=self.dims,
            together=together,
        )

    def keep(self, moved: Tensors) -> None:
        """Write what has moved where this process holds it, if that is not where it moved."""
        if self.gathered:
            for param, values in zip(self.params, moved.params):
                keep_whole(param, values)


def count_trained(groups: Iterable[Group]) -> int:
    """How many tensors are trained together: all, as one without a gradient today may have one tomorrow."""
    params = {param for group in groups for param in group["params"]}
    return sum(p.numel() > 0 and (p.requires_grad or p.grad is not None) for p in params)


def batches(group: Group, rules: RuleRegistry, states: Mapping[Tensor, State]) -> list[Batch]:
    """The parameters of a group that have gradients, by what can be worked on together.

    Args:
        states: Of all parameters. What is empty is made.
    """
    found: dict[tuple[torch.device, torch.dtype, Spread | None, bool], Batch] = {}
    computed: dict[tuple[torch.device, torch.dtype], tuple[torch.dtype, UpdateRule]] = {}
    sha256 = group["rule_sha256"]
    for param in dict.fromkeys(group["params"]):
        if (slope := param.grad) is None:
            continue
        value, grad = as_real(param), as_real(align(slope, param))
        place, layout = (value.device, value.dtype), spread(value)
        if place not in computed:  # for many small tensors, this loop is what a step costs
            dtype = rules.dtype(sha256, value.dtype)
            computed[place] = dtype, rules.placed(sha256, value.device, dtype)
        dtype, rule = computed[place]
        # One call for tensors with coordinates of their own and those without: on small networks calls are what a step
        # costs.
        gathered = layout is not None and has_coordinates(rule, value)
        key = value.device, dtype, layout, gathered
        if (batch := found.get(key)) is None:
            batch = found[key] = Batch(rule, dtype, layout, gathered, [], [], [], [])
        batch.dims.append(param.dim())
        batch.params.append(value)
        batch.grads.append(grad)
        if not (state := states[param]):
            state.update(init_state(rule, value, dtype, group["state_dtype"]))
        batch.states.append(state)
    return list(found.values())


@contextmanager
def held(tensors: Tensors, asked: bool) -> Iterator[None]:
    """Elements whose gradient is exactly zero are afterwards what they were, where that is asked for.

    Done to what a backend has moved, in the tensors' own coordinates: no backend and no bases know of it.
    """
    before = [param.clone() for param in tensors.params] if asked else []
    yield
    for param, old, grad in zip(tensors.params, before, tensors.grads):
        param.copy_(torch.where(grad == 0, old, param))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The precision of a rule does not depend on where in the loop ``step`` is called."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _mesh(layout: Spread | None) -> DeviceMesh | None:
    return None if layout is None else layout[0]
