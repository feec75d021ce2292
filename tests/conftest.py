"""What every test shares: one thread, seeded generators, reproducible property tests."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# Nothing is compiled behind the tests' back; those of the compiled kernels ask for them.
os.environ["LEARNEDOPT_COMPILE"] = "0"

# No deadline: a busy machine is not a failure.
hypothesis.settings.register_profile("learnedopt", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("learnedopt")


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh generator, the same in every test."""
    return torch.Generator().manual_seed(0)
