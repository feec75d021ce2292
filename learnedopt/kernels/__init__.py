"""The same maths, faster: backends that run a rule's step in place, and the choice between them.

:mod:`~learnedopt.kernels.core` is what no rule has to itself. Each other folder is a rule's, and registers its fast
paths, or how it is taken apart, with :func:`register`: a new one is a folder and no change elsewhere.
"""

import importlib
import pkgutil

from learnedopt.kernels.core.base import Backend, Case, StepOptions, Tensors
from learnedopt.kernels.core.dispatch import BackendName, check_name, choose, get_backend, refusal, step
from learnedopt.kernels.core.reference import ReferenceBackend
from learnedopt.kernels.core.registry import register
from learnedopt.kernels.core.state import StateDtype, StoredSpec, keep_state, read_state, state_layout

for _found in pkgutil.iter_modules(__path__):
    if _found.ispkg:
        importlib.import_module(f"{__name__}.{_found.name}")

__all__ = [
    "Backend",
    "BackendName",
    "Case",
    "ReferenceBackend",
    "StateDtype",
    "StepOptions",
    "StoredSpec",
    "Tensors",
    "check_name",
    "choose",
    "get_backend",
    "keep_state",
    "read_state",
    "refusal",
    "register",
    "state_layout",
    "step",
]
