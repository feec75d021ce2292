"""Which rules have fast paths, and which are made of others. Folders of rules register here, and so do users."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from learnedopt.kernels.core.base import Backend, StepOptions, Tensors
from learnedopt.rules.base import UpdateRule

Stepper = Callable[[Backend, Any, Tensors, StepOptions], None]
"""Takes a step of a rule that is made of others: calls :func:`~learnedopt.kernels.step` for each."""
Parts = Callable[[Any], Sequence[UpdateRule]]
"""The rules that a rule is made of."""


@dataclass(frozen=True)
class Composite:
    """How a rule is taken apart."""

    step: Stepper
    parts: Parts


_PROGRAMS: dict[str, dict[type[UpdateRule], Any]] = {"triton": {}, "native": {}, "blocked": {}}
"""By backend and exact type, the class of the program: itself, or the name it is imported by when it is first used."""
_COMPOSITES: dict[type[UpdateRule], tuple[Stepper | str, Parts | str] | Composite] = {}
"""By class, how it is taken apart, or what that is imported by."""
_READY: dict[str, WeakKeyDictionary[UpdateRule, Any]] = {name: WeakKeyDictionary() for name in _PROGRAMS}


def register(
    rule: type[UpdateRule],
    *,
    blocked: type | str | None = None,
    native: type | str | None = None,
    triton: type | str | None = None,
    stepper: Stepper | str | None = None,
    parts: Parts | str | None = None,
) -> None:
    """Say how a kind of rule is computed fast, or what it is made of.

    Each argument is the thing itself or its name, ``"module:name"``, which is imported when it is first used.

    Args:
        rule: Programs serve this very class: a subclass may compute something else. A stepper serves subclasses too.
        blocked, native, triton: Classes of programs, called with the rule: subclasses of
            :class:`learnedopt.kernels.core.blocked.Program`, :class:`learnedopt.kernels.core.native.Program` and
            :class:`learnedopt.kernels.core.triton_backend.Program`.
        stepper: For a rule made of others, takes its step: ``stepper(backend, rule, tensors, options)`` calls
            :func:`~learnedopt.kernels.step` with each part and what that part is to move.
        parts: ``parts(rule)`` are the rules that the stepper hands to backends. A backend that serves all of them
            serves the rule.

    Raises:
        ValueError: of ``stepper`` and ``parts`` only one is given.

    >>> from learnedopt.rules import LSTMRule
    >>> class Mine(LSTMRule):
    ...     '''Computes what it did, and says so.'''
    >>> register(Mine, blocked="learnedopt.kernels.lstm.blocked:Program")
    >>> program_class("blocked", Mine()).__name__
    'Program'
    """
    for backend, program in (("blocked", blocked), ("native", native), ("triton", triton)):
        if program is not None:
            _PROGRAMS[backend][rule] = program
    if (stepper is None) != (parts is None):
        raise ValueError("a rule made of others needs both stepper= and parts=")
    if stepper is not None and parts is not None:
        _COMPOSITES[rule] = (stepper, parts)


def program_class(backend: str, rule: UpdateRule) -> Any | None:
    """The class of the program by which a backend serves a rule; ``None`` where it has none."""
    programs = _PROGRAMS[backend]
    found = programs.get(type(rule))
    if isinstance(found, str):
        found = programs[type(rule)] = _resolved(found)
    return found


def program(backend: str, rule: UpdateRule) -> Any:
    """A rule's program, made once: a frozen rule's weights never change."""
    ready = _READY[backend]
    if rule not in ready:
        found = program_class(backend, rule)
        assert found is not None, f"{backend} has no program for {type(rule).__name__}"
        ready[rule] = found(rule)
    return ready[rule]


def refusal(backend: str, rule: UpdateRule) -> str | None:
    """Why a backend's programs cannot serve a rule, as the end of a sentence; ``None`` where one can."""
    found = program_class(backend, rule)
    if found is None:
        known = ", ".join(kind.__name__ for kind in _PROGRAMS[backend])
        return f"it knows the rules {known}, and this is {type(rule).__name__}"
    reason: str | None = found.refusal(rule)
    return reason


def composite(rule: UpdateRule) -> Composite | None:
    """How a rule is taken apart, by its class or the nearest base; ``None`` where it is whole."""
    for kind in type(rule).__mro__:
        found = _COMPOSITES.get(kind)
        if found is None:
            continue
        if not isinstance(found, Composite):
            step, parts = found
            found = _COMPOSITES[kind] = Composite(_resolved(step), _resolved(parts))
        return found
    return None


def _resolved(named: Any) -> Any:
    return pkgutil.resolve_name(named) if isinstance(named, str) else named


def whole_parts(rule: UpdateRule) -> Iterator[UpdateRule]:
    """The rules that backends are handed in place of a rule: itself, unless it is made of others."""
    found = composite(rule)
    if found is None:
        yield rule
    else:
        for part in found.parts(rule):
            yield from whole_parts(part)
