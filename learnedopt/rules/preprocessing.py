"""Gradient preprocessing: how a gradient of any magnitude becomes an input a network can read."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_sign(x: Tensor, p: float = 10.0) -> Tensor:
    r"""Magnitude and sign of each value on two bounded channels.

    .. math::
        x \mapsto \begin{cases}
            (\log|x| / p,\ \operatorname{sgn} x) & |x| \ge e^{-p} \\
            (-1,\ e^p x)                         & \text{otherwise}
        \end{cases}

    Both channels are continuous at :math:`|x| = e^{-p}`; zero maps to ``(-1, 0)``. The first channel is not bounded
    above: it grows by ``1`` for every factor of :math:`e^p`.

    Args:
        x: Values of shape ``(...)``, any floating-point dtype.
        p: Magnitudes below :math:`e^{-p}` are passed on linearly.

    Returns:
        ``(2, ...)``: the log channel, then the sign channel.

    Source: Andrychowicz et al. 2016 (arXiv:1606.04474), appendix A.

    >>> log_sign(torch.tensor([0.0, 1.0, -1.0]))
    tensor([[-1.,  0.,  0.],
            [ 0.,  1., -1.]])
    """
    # One clamp per channel gives both branches: the logarithm stops at -p where the linear branch begins, and
    # e^p x reaches sgn(x) exactly there. Neither produces a NaN in the branch not taken, forwards or backwards.
    magnitude = x.abs().clamp(min=math.exp(-p)).log() / p
    sign = (x * math.exp(p)).clamp(-1.0, 1.0)
    return torch.stack([magnitude.clamp(min=-1.0), sign])
