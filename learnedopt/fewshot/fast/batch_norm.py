"""Batch normalization by the statistics of the batch, with second derivatives in few passes over it.

Second-order methods differentiate the gradient of every normalization they pass. torch has a formula for that, in which
each term is an operation on the whole batch; here terms are gathered by channel first. Values and first derivatives are
torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalize each channel by its own mean and variance over the batch.

    .. math::
        y = \gamma \hat x + \beta, \qquad \hat x = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}}

    Args:
        x: ``(n, channels, ...)``.
        weight, bias: :math:`\gamma, \beta`, ``(channels,)``; by default 1 and 0.
        eps: Added to the variance.

    Returns:
        What ``torch.nn.functional.batch_norm`` gives, differentiable any number of times, backwards; and, as constants,
        the mean and the unbiased variance of each channel.

    Raises:
        ValueError: a channel has one value only.

    Source: Ioffe & Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate
    shift", ICML 2015 (arXiv:1502.03167), algorithm 1.

    >>> y, mean, variance = batch_norm(torch.tensor([[1.0], [3.0]]), None, None, 0.0)
    >>> y.flatten().tolist(), mean.item(), variance.item()
    ([-1.0, 1.0], 2.0, 2.0)
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"expected more than 1 value per channel to take statistics of, got input of {tuple(x.shape)}")
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    y, mean, variance, _ = _Normalized.apply(x, weight, bias, eps)
    return y, mean.detach(), variance.detach()  # under vmap they are not constants yet


class _Normalized(Function):
    """The outputs, and as constants: mean, unbiased variance, and the inverse of the standard deviation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # With a momentum of one, what torch puts into the running averages is this batch's statistics.
        # They have the weight's dtype, which under autocast is wider than the input's.
        mean, variance = (x.new_zeros(x.shape[1], dtype=weight.dtype) for _ in range(2))
        y, _, scale = torch.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, eps)
        return y, mean, variance, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, variance, scale = output
        ctx.mark_non_differentiable(mean, variance, scale)
        ctx.save_for_backward(x, weight, mean, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight, dbias = _Gradients.apply(grad, *ctx.saved_tensors, ctx.eps)
        return dx, dweight, dbias, None


class _Gradients(Function):
    r"""The gradients of inputs, weight and bias, from those of the outputs.

    With :math:`r` the inverse standard deviation, and in each channel the projection
    :math:`P(z) = z - \mathrm{E}[z] - \hat x\, \mathrm{E}[z \hat x]`,

    .. math::
        dx = \gamma r P(dy), \qquad d\gamma = \sum dy\, \hat x, \qquad d\beta = \sum dy .

    ``mean`` and ``scale`` are those of ``x``, and derivatives by ``x`` include what goes through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, scale, True, eps, [True, True, True]
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        dy, x, weight, mean, scale, ctx.eps = inputs
        _, dweight, dbias = output
        ctx.save_for_backward(dy, x, weight, mean, scale, dweight, dbias)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, vweight: Tensor | None, vbias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        # The derivatives of <v, dx> + <vweight, dweight> + <vbias, dbias>. Each is a sum of whole arrays with factors
        # by channel, and the factors need five sums over the batch: of dy, of v, and of their products with normalized
        # x and with each other.
        dy, x, weight, mean, scale, dy_xhat, dy_sum = ctx.saved_tensors
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() / x.shape[1]

        def channels(value: Tensor) -> Tensor:
            return value.view(-1, *[1] * (x.ndim - 2))

        if torch.is_grad_enabled():  # these will be differentiated too, and statistics depend on x
            variance, mean = torch.var_mean(x.to(weight.dtype), axes, correction=0)
            scale = torch.rsqrt(variance + ctx.eps)
        v = torch.zeros_like(x) if v is None else v
        centred = x - channels(mean)
        # P is symmetric: v goes the way that dy went.
        for_dy, v_xhat, v_sum = _Gradients.apply(v, x, weight, mean, scale, ctx.eps)
        if vweight is not None or vbias is not None:
            vweight = torch.zeros_like(weight) if vweight is None else vweight
            vbias = torch.zeros_like(weight) if vbias is None else vbias
            for_dy = torch.addcmul(for_dy + channels(vbias), centred, channels(vweight * scale))
        product = (v * dy).sum(axes, dtype=scale.dtype) - (v_sum * dy_sum + v_xhat * dy_xhat) / count  # <v, P(dy)>
        of_dy = -weight * scale * v_xhat / count if vweight is None else vweight - weight * scale * v_xhat / count
        of_v = -weight * scale * dy_xhat / count
        of_xhat = -(of_dy * dy_xhat + of_v * v_xhat + weight * scale * product) / count
        constant = -(of_dy * dy_sum + of_v * v_sum) / count
        for_x = torch.addcmul(channels(scale * constant), dy, channels(scale * of_dy))
        for_x = torch.addcmul(for_x, v, channels(scale * of_v))
        for_x = torch.addcmul(for_x, centred, channels(scale * scale * of_xhat))
        return for_dy, for_x, scale * product, None, None, None
