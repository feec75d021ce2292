r"""How a rule's memory is kept: in full, in bfloat16, or in eight bits.

Only the *vectors* of a state are kept in less than full precision: the coordinate-scope entries whose spec has a
shape, such as the units of an LSTM, which make up nearly all of it. Numbers that each coordinate has one of, such as
momenta, and all tensor-scope entries stay in the dtype that is computed in.

``"bfloat16"`` rounds to nearest. ``"int8"`` keeps, for each vector :math:`x` along the last axis of the spec's shape
(the units of one layer, at one coordinate),

.. math::
    m = \mathrm{bf16}(\max_u |x_u|), \qquad
    q_u = \operatorname{sgn}(x_u)\, \mathrm{round}\sqrt{|x_u| \cdot 127^2 / \max(m, 10^{-30})}, \qquad
    \hat x_u = m\, q_u |q_u| / 127^2

that is, one byte per unit and two bytes per vector; a vector that is not finite is read back as NaN. The square root
spends the codes where most units are: one in eight lies below :math:`m / 64`. Rounding is to nearest, half to even:
what is kept depends on nothing but what was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learnedopt.rules import State, StateSpec, UpdateRule

StateDtype = Literal["float32", "bfloat16", "int8"]
"""``"float32"`` is whatever is computed in: float32 or wider."""

SCALE = "_scale"
"""``h`` in eight bits is ``h`` and ``h_scale``."""
CODES = 127
"""Codes go from minus to plus this."""
SMALLEST = 1e-30
"""What codes are relative to is at least this: one over it is finite."""


@dataclass(frozen=True)
class StoredSpec:
    """One tensor of a state as it is kept; as :class:`~learnedopt.rules.StateSpec`, with its dtype."""

    shape: tuple[int, ...]
    scope: Literal["coordinate", "tensor"]
    dtype: torch.dtype


def state_layout(rule: UpdateRule, dtype: torch.dtype, state_dtype: StateDtype) -> dict[str, StoredSpec]:
    """The tensors that a rule's state is kept in. They start at zero, which is read as zero.

    Args:
        dtype: What is computed in.

    >>> from learnedopt.rules import LSTMRule
    >>> for name, spec in state_layout(LSTMRule(), torch.float32, "int8").items():
    ...     print(name, spec.shape, spec.dtype)
    h (2, 20) torch.int8
    h_scale (2,) torch.bfloat16
    c (2, 20) torch.int8
    c_scale (2,) torch.bfloat16
    """
    layout = {}
    for name, spec in rule.state_spec().items():
        kept = dtype if state_dtype == "float32" or not _is_vector(spec) else getattr(torch, state_dtype)
        layout[name] = StoredSpec(spec.shape, spec.scope, kept)
        if kept == torch.int8:
            layout[name + SCALE] = StoredSpec(spec.shape[:-1], spec.scope, torch.bfloat16)
    return layout


def read_state(stored: Mapping[str, Tensor], spec: Mapping[str, StateSpec], dtype: torch.dtype) -> State:
    """State ``(*shape, n)`` as a rule takes it, from how it is kept; not a copy where nothing has to be converted."""
    return {
        name: decode(stored[name], stored[name + SCALE], dtype)
        if stored[name].dtype == torch.int8
        else stored[name].to(dtype)
        for name in spec
    }


def keep_state(values: Mapping[str, Tensor], layout: Mapping[str, StoredSpec]) -> State:
    """How state ``(*shape, n)`` that a rule gave is kept: the reverse of :func:`read_state`."""
    kept: State = {}
    for name, value in values.items():
        if layout[name].dtype == torch.int8:
            kept[name], kept[name + SCALE] = encode(value, len(layout[name].shape) - 1)
        else:
            kept[name] = value.to(layout[name].dtype)
    return kept


def encode(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The codes of vectors along ``dim``, and their scales, without that dimension.

    >>> codes, scale = encode(torch.tensor([[0.5], [-0.125], [0.0]]), 0)
    >>> codes.flatten(), scale, decode(codes, scale, torch.float32).flatten()
    (tensor([127, -64,   0], dtype=torch.int8),
     tensor([0.5000], dtype=torch.bfloat16),
     tensor([ 0.5000, -0.1270,  0.0000]))
    """
    scale = x.abs().amax(dim).to(torch.bfloat16)
    wide = scale.to(x.dtype).unsqueeze(dim).clamp(min=SMALLEST)
    # What is not finite has no code: there the scale alone says what the vector is.
    return (x.abs() * (CODES**2 / wide)).sqrt().round().copysign(x).nan_to_num(0.0).to(torch.int8), scale


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for; the scale's missing dimension is the one before the coordinates'."""
    wide = codes.to(dtype)
    return wide * wide.abs() * (scale.to(dtype) / CODES**2).unsqueeze(scale.dim() - 1)


def _is_vector(spec: StateSpec) -> bool:
    return spec.scope == "coordinate" and spec.shape != ()
