"""Episodes that go through the network some at a time: how many, and the gradient of their mean loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learnedopt.fewshot.fast.vectorized import numbers_per_image

_NUMBERS = 2**22
"""In the largest array: up to there allocators keep memory for the next step, and caches hold part of it."""


def fastest(
    module: nn.Module, example_shape: tuple[int, ...], images: int, shares_weights: bool, device: torch.device
) -> int | None:
    """How many episodes, of so many images each, go through the network in ``module`` together; ``None`` for all."""
    each = max(images, 1) * numbers_per_image(module, example_shape)
    if each == math.inf or (each and shares_weights and device.type == "cpu"):
        return 1
    return max(1, int(_NUMBERS / each)) if each and device.type == "cpu" else None


def mean_loss(losses: Iterable[Tensor], weights: Sequence[Tensor], count: int) -> Tensor:
    """The mean of losses that are computed part by part; the graph of each part is let go before the next.

    Args:
        losses: Of the episodes of each part, ``(E,)``; computed as they are asked for.
        weights: What the result shall be differentiated by, once.
        count: How many episodes there are.
    """
    total: Tensor | None = None
    gradients: list[Tensor | None] = [None] * len(weights)
    for part in losses:
        loss = part.sum() / count
        total = loss.detach() if total is None else total + loss.detach()
        if not loss.requires_grad:  # in evaluation mode, where a method makes constants of all that it computes
            continue
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        # Not in place: autograd gives two parameters that were added to each other the same tensor.
        gradients = [new if old is None else old if new is None else old + new for old, new in zip(gradients, found)]
    assert total is not None
    if all(gradient is None for gradient in gradients):
        return total
    loss_with_gradients: Tensor = _Differentiated.apply(total, gradients, *weights)
    return loss_with_gradients


class _Differentiated(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else gradient * grad for gradient in ctx.gradients)
