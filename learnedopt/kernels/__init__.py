"""The same maths, faster: backends that run a rule's step in place, and the choice between them."""

from learnedopt.kernels.base import Backend, Case, Tensors
from learnedopt.kernels.bases import AGE, initial_matrices, step_in_bases
from learnedopt.kernels.choice import BackendName, check_name, choose, get_backend
from learnedopt.kernels.dispatch import step
from learnedopt.kernels.reference import ReferenceBackend
from learnedopt.kernels.state import StateDtype, StoredSpec, keep_state, read_state, state_layout

__all__ = [
    "AGE",
    "Backend",
    "BackendName",
    "Case",
    "ReferenceBackend",
    "StateDtype",
    "StoredSpec",
    "Tensors",
    "check_name",
    "choose",
    "get_backend",
    "initial_matrices",
    "keep_state",
    "read_state",
    "state_layout",
    "step",
    "step_in_bases",
]
