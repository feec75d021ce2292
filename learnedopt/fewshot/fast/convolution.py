"""Convolutions whose derivatives of every order are convolutions again.

Methods with an inner loop differentiate the gradient of every convolution they pass, with weights that differ from
episode to episode. torch has a formula for the second derivatives, in which groups are taken one by one; here the
gradients are operations of their own, whose derivatives are the same three operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Geometry:
    """How the weights are laid over the images, by rows and columns."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    r"""A convolution in two dimensions.

    With :math:`T(x, w, z) = \langle z, w * x \rangle`, which is linear in each of the three, the outputs are
    :math:`\partial T / \partial z`, and the gradients by inputs and weights, given those of the outputs as :math:`z`,
    :math:`\partial T / \partial x` and :math:`\partial T / \partial w`. Whatever is differentiated how often, it comes
    down to these three.

    Args:
        x: ``(n, groups * inputs, height, width)``.
        weight: ``(groups * outputs, inputs, rows, columns)``.
        bias: ``(groups * outputs,)``.
        geometry: Stride, padding, dilation and groups.

    Returns:
        What ``torch.nn.functional.conv2d`` gives, under autocast too, differentiable any number of times, backwards.

    >>> x = torch.arange(9.0).view(1, 1, 3, 3).requires_grad_()
    >>> convolution(x, torch.ones(1, 1, 2, 2), None, Geometry()).tolist()
    [[[[8.0, 12.0], [20.0, 24.0]]]]
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # it does not cover the backward operations
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    outputs: Tensor = _Outputs.apply(x, weight, bias, geometry)
    return outputs


class _Outputs(Function):
    """From inputs and weights; the bias goes with it because adding it there costs nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            _OfInputs.apply(z, weight, x.detach(), ctx.geometry) if of_x else None,
            _OfWeights.apply(z, x, weight.detach(), ctx.geometry) if of_weight else None,
            # Not the library's, which on a CPU takes longer over the bias than over the weights.
            z.sum((0, 2, 3)) if of_bias else None,
            None,
        )


class _OfInputs(Function):
    """From the gradient of the outputs and the weights; of ``x`` only the shape counts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        return _gradients(z, x, weight, geometry, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(z, weight)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        z, weight = ctx.saved_tensors
        of_z, of_weight, _, _ = ctx.needs_input_grad
        return (
            _Outputs.apply(x, weight, None, ctx.geometry) if of_z else None,
            _OfWeights.apply(z, x, weight.detach(), ctx.geometry) if of_weight else None,
            None,
            None,
        )


class _OfWeights(Function):
    """From the gradient of the outputs and the inputs; of ``weight`` only the shape counts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _gradients(z, x, weight, geometry, [False, True, False])[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, x, _, ctx.geometry = inputs
        ctx.save_for_backward(z, x)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        z, x = ctx.saved_tensors
        of_z, of_x, _, _ = ctx.needs_input_grad
        return (
            _Outputs.apply(x, weight, None, ctx.geometry) if of_z else None,
            _OfInputs.apply(z, weight, x.detach(), ctx.geometry) if of_x else None,
            None,
            None,
        )


def _gradients(z: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: list[bool]) -> tuple[Tensor, Tensor]:
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        z, x, weight, None, stride, padding, dilation, False, [0, 0], geometry.groups, which
    )
    return of_x, of_weight
