"""State in eight and ten bits, read and written in place for the blocked backend: :mod:`~.state` says what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learnedopt.kernels.core.state import CODES, FINE_CODES, LOW, PER_BYTE, SCALE, SMALLEST

if TYPE_CHECKING:
    from learnedopt.kernels.core.blocked import Block


def decode(block: Block, name: str, layer: int, codes: Tensor) -> None:
    """Turn codes, or the upper eight bits of them, into what they stand for, where they are."""
    most: float = CODES
    if _is_fine(block, name):
        most = FINE_CODES / PER_BYTE
        _read_low(block, name + LOW, layer, codes)
    scale = block.views.scale
    block.read(name + SCALE, layer, scale)
    codes.mul_(torch.abs(codes, out=block.views.scratch)).mul_(scale.div_(most**2))


def encode(block: Block, name: str, layer: int, values: Tensor) -> Tensor:
    """Keep the scale and the lower bits of new values; returns the codes, or the upper eight bits of them."""
    views = block.views
    scale, codes = views.scale, torch.abs(values, out=views.scratch)
    torch.amax(codes, dim=0, keepdim=True, out=scale)
    block.write(name + SCALE, layer, scale)
    block.read(name + SCALE, layer, scale)  # as it was rounded
    fine = _is_fine(block, name)
    most = FINE_CODES if fine else CODES
    codes.mul_(scale.clamp_(min=SMALLEST).reciprocal_().mul_(most**2)).sqrt_().round_()
    # Not copysign, which takes longer than all of this together.
    codes.clamp_(max=most).mul_(torch.sign(values, out=views.spare))
    if not fine:
        return codes
    upper = torch.mul(codes, 1.0 / PER_BYTE, out=views.spare).floor_()
    _write_low(block, name + LOW, layer, codes.sub_(upper, alpha=PER_BYTE))
    return upper


def _is_fine(block: Block, name: str) -> bool:
    return name + LOW in block.parts[0].state


def _read_low(block: Block, name: str, layer: int, codes: Tensor) -> None:
    """Add the lower bits of codes to the upper ones, of which a unit is their whole."""
    low, digits = block.views.low, block.views.digits
    block.read(name, layer, low)
    for unit in reversed(range(1, PER_BYTE)):
        torch.mul(low, 1.0 / PER_BYTE**unit, out=digits).floor_()
        low.sub_(digits, alpha=PER_BYTE**unit)
        rows = codes[unit::PER_BYTE]
        rows.add_(digits[: len(rows)], alpha=1.0 / PER_BYTE)
    codes[::PER_BYTE].add_(low, alpha=1.0 / PER_BYTE)


def _write_low(block: Block, name: str, layer: int, digits: Tensor) -> None:
    """Keep the lower bits of codes."""
    low = block.views.low.copy_(digits[::PER_BYTE])
    for unit in range(1, PER_BYTE):
        rows = digits[unit::PER_BYTE]
        low[: len(rows)].add_(rows, alpha=PER_BYTE**unit)
    block.write(name, layer, low)
