"""Which backend serves, and one step by it: the only place where either is decided."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from learnedopt.kernels.core import registry
from learnedopt.kernels.core.base import Backend, Case, StepOptions, Tensors
from learnedopt.kernels.core.means import tensor_state
from learnedopt.rules.base import State, UpdateRule

BackendName = Literal["auto", "triton", "native", "blocked", "reference"]
"""``"auto"``, or one of the backends, the fastest first."""

_CLASSES = {
    "triton": "learnedopt.kernels.core.triton_backend:TritonBackend",
    "native": "learnedopt.kernels.core.native:NativeBackend",
    "blocked": "learnedopt.kernels.core.blocked:BlockedBackend",
    "reference": "learnedopt.kernels.core.reference:ReferenceBackend",
}


@cache
def get_backend(name: str) -> Backend:
    """The backend of a name. Its module is imported now, not with the package.

    >>> get_backend("blocked").name
    'blocked'
    """
    backend: Backend = pkgutil.resolve_name(_CLASSES[name])()
    return backend


def choose(case: Case, asked: BackendName = "auto") -> tuple[Backend, dict[str, str]]:
    """The backend for a case, and why each faster one is not it.

    ``"auto"`` is the fastest that can serve and is ready. The compiled kernels are compiled in the background when they
    are first wanted on a machine, and programs that start later have them. Asked for by name, it is that one or an
    error, never another. A rule made of others is served by one backend that can serve them all.

    The size of a model does not decide. Only a step that is little but the overhead of its calls, below some ten
    thousand parameters, is at times faster by the reference than by ``"blocked"``: by a tenth or so, for rules that
    take means. That is not worth it that steps are rounded in another way once a model grows.

    Raises:
        ValueError: there is no backend of that name, or it cannot serve this case.
        RuntimeError: it cannot be made ready, as when a compiler is missing.

    >>> import torch
    >>> from learnedopt.rules import LSTMRule
    >>> case = Case(LSTMRule(), torch.device("cpu"), torch.float32, "float32")
    >>> backend, reasons = choose(case, "reference")
    >>> backend.name, reasons
    ('reference', {})
    """
    check_name(asked)
    if asked != "auto":
        backend = get_backend(asked)
        if reason := refusal(backend, case):
            raise ValueError(f"the backend {asked!r} was asked for and cannot serve: {reason}")
        backend.prepare()
        return backend, {}
    reasons: dict[str, str] = {}
    for name in _CLASSES:
        backend = get_backend(name)
        unready = refusal(backend, case) or backend.unprepared()
        if unready is None:
            return backend, reasons
        reasons[name] = unready
    raise AssertionError("the reference serves everything")


def refusal(backend: Backend, case: Case) -> str | None:
    """Why a backend cannot serve a case, or a part of its rule, as the end of a sentence; ``None`` where it can."""
    reasons = (backend.refusal(replace(case, rule=rule)) for rule in registry.whole_parts(case.rule))
    return next((reason for reason in reasons if reason is not None), None)


def check_name(asked: str) -> None:
    """Raise ``ValueError`` unless a backend can be asked for by this name."""
    if asked not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {asked!r}")


def step(backend: Backend, rule: UpdateRule, tensors: Tensors, options: StepOptions) -> None:
    r"""Move parameters and advance their state by one step of ``rule``, in place.

    .. math::
        \theta \leftarrow (1 - \eta\lambda)\,\theta + \eta\, \Delta(\theta, g)

    with :math:`\eta` = ``options.lr`` and :math:`\lambda` = ``options.weight_decay``. What moves a rule that is made of
    others is its stepper (:func:`~learnedopt.kernels.register`).

    Args:
        backend: One that can serve, from :func:`~learnedopt.kernels.choose`.
        rule: Frozen, on the tensors' device, in the dtype that is computed in.
    """
    if tensors.device.type == "cpu":  # the host reads its own memory without waiting
        if options.skip is not None and options.skip:
            return
        options = replace(options, lr=float(options.lr), skip=None)
    if (made_of := registry.composite(rule)) is not None:
        made_of.step(backend, rule, tensors, options)
        return
    statistics, tensor_state = backend.statistics(rule, tensors, options.loss)
    statistics, changed = with_lr(rule, tensors, statistics, options.lr)
    backend.update(rule, tensors, statistics, options)
    keep_tensor_state(tensors.states, tensor_state | changed, options.skip)


def with_lr(rule: UpdateRule, tensors: Tensors, statistics: Tensor, lr: float | Tensor) -> tuple[Tensor, State]:
    """What a rule makes of statistics at an ``lr`` (:meth:`~learnedopt.rules.UpdateRule.with_lr`), if anything."""
    if type(rule).with_lr is UpdateRule.with_lr:
        return statistics, {}
    return rule.with_lr(statistics, tensor_state(rule, tensors), lr)


def keep_tensor_state(states: Sequence[State], tensor_state: State, skip: Tensor | None) -> None:
    """Write the tensor-scope state that :meth:`~learnedopt.kernels.Backend.statistics` gave, unless to be skipped."""
    for name, values in tensor_state.items():
        kept = [state[name] for state in states]
        new = values if skip is None else torch.where(skip, torch.stack(kept, dim=-1), values)
        torch._foreach_copy_(kept, list(new.unbind(-1)))
