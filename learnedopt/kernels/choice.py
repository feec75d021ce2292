"""Which backend serves: the only place where that is decided."""

from __future__ import annotations

import pkgutil
from functools import cache
from typing import Literal, get_args

from learnedopt.kernels.base import Backend, Case

BackendName = Literal["auto", "triton", "native", "blocked", "reference"]
"""``"auto"``, or one of the backends, the fastest first."""

_CLASSES = {
    "triton": "learnedopt.kernels.triton_backend:TritonBackend",
    "native": "learnedopt.kernels.native:NativeBackend",
    "blocked": "learnedopt.kernels.blocked:BlockedBackend",
    "reference": "learnedopt.kernels.reference:ReferenceBackend",
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

    ``"auto"`` is the fastest that can serve and is ready: one that would first have to compile has to be asked for by
    name once, on this machine. Asked for by name, it is that one or an error, never another.

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
        if refusal := backend.refusal(case):
            raise ValueError(f"the backend {asked!r} was asked for and cannot serve: {refusal}")
        backend.prepare()
        return backend, {}
    reasons: dict[str, str] = {}
    for name in _CLASSES:
        backend = get_backend(name)
        reason = backend.refusal(case) or backend.unprepared()
        if reason is None:
            return backend, reasons
        reasons[name] = reason
    raise AssertionError("the reference serves everything")


def check_name(asked: str) -> None:
    """Raise ``ValueError`` unless a backend can be asked for by this name."""
    if asked not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {asked!r}")
