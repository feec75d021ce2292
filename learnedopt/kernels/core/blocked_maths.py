"""What several rules compute, in place for the blocked backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learnedopt.rules.moments import Averaging


def adam_directions(
    grad: Tensor, corrections: Tensor, moments: tuple[Tensor, Tensor], settings: Averaging, out: Tensor, rms: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`~learnedopt.rules.moments.adam_directions` into the two rows of ``out``, the moments where they are."""
    momentum, square = moments
    limits = torch.finfo(grad.dtype)
    limit = 0.5 * math.sqrt(limits.max)
    grad.clamp_(-limit, limit)
    momentum.mul_(settings.momentum_decay).add_(grad, alpha=1.0 - settings.momentum_decay)
    torch.mul(grad, grad, out=rms)
    square.mul_(settings.square_decay).add_(rms, alpha=1.0 - settings.square_decay)
    torch.mul(square, corrections[1:2], out=rms).clamp_(min=limits.tiny).sqrt_().add_(settings.eps)
    a = torch.mul(momentum, corrections[:1], out=out[:1]).div_(rms)
    return a, torch.div(grad, rms, out=out[1:])


def log_sign(x: Tensor, p: float, out: Tensor) -> None:
    """:func:`~learnedopt.rules.log_sign` of ``(1, n)`` into ``(2, n)``."""
    torch.abs(x, out=out[:1]).clamp_(min=math.exp(-p)).log_().div_(p).clamp_(min=-1.0)
    torch.mul(x, math.exp(p), out=out[1:]).clamp_(-1.0, 1.0)
