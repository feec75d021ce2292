"""Muon for matrices and AdamW for the rest, many copies at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Setting(Protocol):
    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> float | None: ...


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS, _MOMENTUM = 5, 0.95
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """Whether Muon's authors would have it optimize this parameter: a matrix, neither an embedding nor the output."""
    return ndim == 2 and not any(word in name for word in ("embedding", "position", "output"))


def orthogonalized(x: Tensor) -> Tensor:
    r"""Matrices ``(..., n, m)`` with their singular values brought near 1, in bfloat16 like :class:`torch.optim.Muon`.

    Five rounds of :math:`X \leftarrow aX + (b A + c A^2) X` with :math:`A = X X^\top`, after division by the Frobenius
    norm.

    >>> values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 4, 8)).float())
    >>> bool(((values > 0.3) & (values < 1.5)).all())
    True
    """
    a, b, c = _COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(torch.bfloat16)
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y


class StackedMuon(Optimizer):
    r"""``torch.optim.Muon`` for hidden matrices and ``torch.optim.AdamW`` for everything else, vectorized.

    For a matrix :math:`\theta` of n rows and m columns with gradient g:

    .. math::
        M &\leftarrow \mu M + (1 - \mu) g, \qquad O = \mathrm{orthogonalized}((1 - \mu) g + \mu M) \\
        \theta &\leftarrow (1 - \eta\lambda)\,\theta - 0.2 \sqrt{\max(n, m)}\; \eta\, O

    which is ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` with its Nesterov momentum of 0.95: its steps are as
    large as AdamW's, so that one learning rate serves both parts.

    Args:
        params: By name, ``(settings, copies, *shape)``. :func:`is_hidden_matrix` says which are Muon's.
        settings: Learning rate and weight decay of each setting.

    Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024; the scale of the step: Liu
    et al., *Muon is Scalable for LLM Training*, 2025 (arXiv:2502.16982, section 2.2).
    """

    def __init__(self, params: Mapping[str, Tensor], settings: Sequence[_Setting]) -> None:
        self._lr = torch.tensor([setting.lr for setting in settings])
        self._decay = torch.tensor([setting.weight_decay or 0.0 for setting in settings])
        groups: list[dict[str, Any]] = [
            {"params": [tensor], "muon": is_hidden_matrix(name, tensor.ndim - 2)} for name, tensor in params.items()
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (param,) = group["params"]
            state = self.state[param]
            shape = (-1, *[1] * (param.ndim - 1))
            lr, decay = self._lr.view(shape), self._decay.view(shape)
            param.mul_(1 - lr * decay)
            update = self._muon(param.grad, state) if group["muon"] else self._adam(param.grad, state)
            param.sub_(lr * update)

    def _muon(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        momentum = state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        scale = 0.2 * math.sqrt(max(grad.shape[-2:]))
        return scale * orthogonalized(grad.lerp(momentum, _MOMENTUM)).to(grad.dtype)

    def _adam(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state.update(step=0, mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
        state["step"] += 1
        mean = state["mean"].lerp_(grad, 1 - _BETA1)
        square = state["square"].mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
        root = square.sqrt().div_(math.sqrt(1 - _BETA2 ** state["step"])).add_(_EPS)
        return mean / root / (1 - _BETA1 ** state["step"])
