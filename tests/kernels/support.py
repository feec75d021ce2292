"""What tests of the kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_codes(state: dict[str, Tensor], name: str) -> Tensor:
    """The codes of an entry that is kept in eight or in ten bits, ``(layers, units, ...)``."""
    codes = state[name].float()
    if f"{name}_low" not in state:
        return codes
    low = state[f"{name}_low"].int()
    digits = torch.stack([low >> 2 * unit & 3 for unit in range(4)], dim=2).flatten(1, 2)
    return 4.0 * codes + digits[:, : codes.shape[1]]
