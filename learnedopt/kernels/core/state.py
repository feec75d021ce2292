r"""How a rule's memory is kept: in full, in bfloat16, or in eight bits, of which what accumulates gets ten.

Only the *vectors* of a state are kept in less than full precision: the coordinate-scope entries whose spec has a
shape, such as the units of an LSTM, which make up nearly all of it. Numbers that each coordinate has one of, such as
momenta, and all tensor-scope entries stay in the dtype that is computed in.

``"bfloat16"`` rounds to nearest. ``"int8"`` keeps, for each vector :math:`x` along the last axis of the spec's shape
(the units of one layer, at one coordinate),

.. math::
    m = \mathrm{bf16}(\max_u |x_u|), \qquad
    q_u = \operatorname{sgn}(x_u) \min\!\big(Q, \mathrm{round}\sqrt{|x_u| \cdot Q^2 / \max(m, 10^{-30})}\,\big),
    \qquad \hat x_u = m\, q_u |q_u| / Q^2

with :math:`Q = 127`: one byte per unit and two bytes per vector. A vector that is not finite is read back as NaN. The
square root spends the codes where most units are: one in eight lies below :math:`m / 64`. Rounding is to nearest, half
to even: what is kept depends on nothing but what was computed.

Entries that accumulate (:class:`~learnedopt.rules.StateSpec`), such as an LSTM's cells, would add up those errors. They
have :math:`Q = 511`, codes of ten bits: a byte per unit holds :math:`\lfloor q_u / 4 \rfloor`, and a further byte for
each four units holds what that leaves, unit :math:`u` in bits :math:`2 (u \bmod 4)` of byte
:math:`\lfloor u / 4 \rfloor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from learnedopt.rules.base import State, StateSpec, UpdateRule

StateDtype = Literal["float32", "bfloat16", "int8"]
"""``"float32"`` is whatever is computed in: float32 or wider."""

SCALE, LOW = "_scale", "_low"
"""``h`` in eight bits is ``h`` and ``h_scale``; ``c`` in ten bits is ``c``, its lower bits ``c_low``, ``c_scale``."""
CODES, FINE_CODES = 127, 511
"""Codes of eight and of ten bits go from minus to plus this."""
PER_BYTE = 4
"""As many units have their two lower bits in one byte; it is also what the upper eight bits count in."""
SMALLEST = 1e-30
"""What codes are relative to is at least this: one over it is finite."""


@dataclass(frozen=True)
class StoredSpec:
    """One tensor of a state as it is kept; as :class:`~learnedopt.rules.StateSpec`, with its dtype."""

    shape: tuple[int, ...]
    scope: Literal["coordinate", "tensor"]
    dtype: torch.dtype
    starts_at: Literal["zero", "param"] = "zero"


def state_layout(rule: UpdateRule, dtype: torch.dtype, state_dtype: StateDtype) -> dict[str, StoredSpec]:
    """The tensors that a rule's state is kept in. Zero is read as zero.

    Args:
        dtype: What is computed in.

    >>> from learnedopt.rules import LSTMRule
    >>> for name, spec in state_layout(LSTMRule(), torch.float32, "int8").items():
    ...     print(name, spec.shape, spec.dtype)
    h (2, 20) torch.int8
    h_scale (2,) torch.bfloat16
    c (2, 20) torch.int8
    c_low (2, 5) torch.uint8
    c_scale (2,) torch.bfloat16
    """
    layout = {}
    for name, spec in rule.state_spec().items():
        kept = dtype if state_dtype == "float32" or not _is_vector(spec) else getattr(torch, state_dtype)
        layout[name] = StoredSpec(spec.shape, spec.scope, kept, spec.starts_at)
        if kept == torch.int8:
            *lead, units = spec.shape
            if spec.accumulates:
                layout[name + LOW] = StoredSpec((*lead, low_bytes(units)), spec.scope, torch.uint8)
            layout[name + SCALE] = StoredSpec((*lead,), spec.scope, torch.bfloat16)
    return layout


def low_bytes(units: int) -> int:
    """How many bytes the lower bits of a vector take."""
    return -(-units // PER_BYTE)


def read_state(stored: Mapping[str, Tensor], spec: Mapping[str, StateSpec], dtype: torch.dtype) -> State:
    """State ``(*shape, n)`` as a rule takes it, from how it is kept; not a copy where nothing has to be converted."""
    return {
        name: decode(stored[name], stored.get(name + LOW), stored[name + SCALE], dtype)
        if stored[name].dtype == torch.int8
        else stored[name].to(dtype)
        for name in spec
    }


def keep_state(values: Mapping[str, Tensor], layout: Mapping[str, StoredSpec]) -> State:
    """How state ``(*shape, n)`` that a rule gave is kept: the reverse of :func:`read_state`."""
    kept: State = {}
    for name, value in values.items():
        if layout[name].dtype == torch.int8:
            kept[name], low, kept[name + SCALE] = encode(value, fine=name + LOW in layout)
            if low is not None:
                kept[name + LOW] = low
        else:
            kept[name] = value.to(layout[name].dtype)
    return kept


def encode(x: Tensor, fine: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The codes of vectors along the last but one dimension.

    Args:
        x: ``(..., H, n)``.
        fine: With ten bits instead of eight.

    Returns:
        The codes or their upper eight bits, ``(..., H, n)``; the lower bits of ten, ``(..., ceil(H / 4), n)``; the
        scales, ``(..., n)``.

    >>> codes, low, scale = encode(torch.tensor([[0.5], [-0.125], [0.0]]), fine=False)
    >>> codes.flatten(), scale, decode(codes, low, scale, torch.float32).flatten()
    (tensor([127, -64,   0], dtype=torch.int8),
     tensor([0.5000], dtype=torch.bfloat16),
     tensor([ 0.5000, -0.1270,  0.0000]))
    >>> fine = encode(torch.tensor([[0.5], [-0.125], [0.0]]), fine=True)
    >>> decode(*fine, torch.float32).flatten()
    tensor([ 0.5000, -0.1255,  0.0000])
    """
    most = FINE_CODES if fine else CODES
    scale = x.abs().amax(-2).to(torch.bfloat16)
    wide = scale.to(x.dtype).unsqueeze(-2).clamp(min=SMALLEST)
    # The scale may have been rounded down, by so much that ten bits can tell.
    codes = (x.abs() * (most**2 / wide)).sqrt().round().clamp(max=most).copysign(x)
    # What is not finite has no code: there the scale alone says what the vector is.
    codes = codes.nan_to_num(0.0).to(torch.int16)
    if not fine:
        return codes.to(torch.int8), None, scale
    digits = (codes & (PER_BYTE - 1)).to(torch.uint8)
    size = low_bytes(x.shape[-2])
    digits = pad(digits, (0, 0, 0, PER_BYTE * size - x.shape[-2])).unflatten(-2, (size, PER_BYTE))
    low = torch.stack([part << 2 * unit for unit, part in enumerate(digits.unbind(-2))]).sum(0, dtype=torch.uint8)
    return (codes >> 2).to(torch.int8), low, scale


def decode(codes: Tensor, low: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`encode` was given, as near as it was kept."""
    wide, most = codes.to(dtype), CODES
    if low is not None:
        digits = torch.stack([(low >> 2 * unit) & (PER_BYTE - 1) for unit in range(PER_BYTE)], dim=-2)
        wide, most = wide * PER_BYTE + digits.flatten(-3, -2)[..., : codes.shape[-2], :], FINE_CODES
    return wide * wide.abs() * (scale.to(dtype) / most**2).unsqueeze(-2)


def _is_vector(spec: StateSpec) -> bool:
    return spec.scope == "coordinate" and spec.shape != ()
