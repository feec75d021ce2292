"""Batch normalization by the batch's own statistics, beside the formula and torch's, to the third derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from learnedopt.fewshot import normalization
from learnedopt.fewshot.fast.batch_norm import batch_norm
from tests.fewshot.support import derivatives, episodes, generator, make

EPS = 1e-3
SHAPES = [(5, 3), (4, 3, 6), (4, 3, 2, 5)]
Inputs = tuple[Tensor, Tensor | None, Tensor | None]
Normalize = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def mine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return batch_norm(x, weight, bias, EPS)[0]


def theirs(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)


def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    y = (x - mean) / (variance + EPS).sqrt()
    return y if weight is None or bias is None else y * weight.view(shape) + bias.view(shape)


def inputs(shape: tuple[int, ...], affine: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    draw = generator(3)
    x = (2.0 + torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)
    weight, bias = (torch.randn(shape[1], generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    return x.requires_grad_(), weight.requires_grad_() if affine else None, bias.requires_grad_() if affine else None


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives(shape: tuple[int, ...], affine: bool, order: int) -> None:
    found = derivatives(mine, inputs(shape, affine), order)
    # torch has no third derivatives.
    for reference in (formula, theirs) if order < 3 else (formula,):
        torch.testing.assert_close(found, derivatives(reference, inputs(shape, affine), order), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivatives_of_each_gradient_alone(shape: tuple[int, ...]) -> None:
    """Where only the gradient of the inputs, of the weight or of the bias is used, the others are not there at all."""
    x, weight, bias = inputs(shape)
    assert weight is not None and bias is not None
    values = (x, weight, bias)
    for which in range(3):

        def one(x: Tensor, weight: Tensor, bias: Tensor, which: int = which) -> Tensor:
            with torch.enable_grad():
                total = mine(x, weight, bias).pow(3).sum()
                return torch.autograd.grad(total, (x, weight, bias), create_graph=True)[which]

        assert torch.autograd.gradcheck(one, values)
        assert torch.autograd.gradgradcheck(one, values)


def test_second_derivatives_in_float32_with_channels_last() -> None:
    exact = derivatives(theirs, inputs((8, 3, 6, 6)), 2)
    x, weight, bias = inputs((8, 3, 6, 6), dtype=torch.float32)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    found = derivatives(mine, (x, weight, bias), 2)
    torch.testing.assert_close(
        [value.double() for value in found], exact, rtol=1e-4, atol=1e-4 * exact[0].abs().max().item()
    )


def test_the_statistics_are_those_of_the_batch() -> None:
    x, weight, bias = inputs((4, 3, 2, 5))
    _, mean, variance = batch_norm(x, weight, bias, EPS)
    torch.testing.assert_close((mean, variance), (x.mean((0, 2, 3)).detach(), x.var((0, 2, 3)).detach()))
    assert not mean.requires_grad and not variance.requires_grad


def test_under_vmap_with_second_derivatives() -> None:
    draw = generator(4)
    x, weight = torch.randn(6, 5, 3, generator=draw).double(), torch.randn(6, 3, generator=draw).double()

    def second(normalize: Normalize) -> Callable[[Tensor, Tensor], Tensor]:
        def first(x: Tensor, weight: Tensor) -> Tensor:
            return torch.func.grad(lambda x: normalize(x, weight, None).pow(3).sum())(x)

        return torch.func.grad(lambda x, weight: first(x, weight).pow(2).sum())

    found = torch.func.vmap(second(mine))(x, weight)
    alone = torch.stack([second(theirs)(*values) for values in zip(x, weight)])
    torch.testing.assert_close(found, alone)
    used = torch.func.vmap(lambda x: batch_norm(x, None, None, EPS)[1:])(x.requires_grad_())
    torch.testing.assert_close(used, (x.mean(1), x.var(1)))
    assert not any(value.requires_grad for value in used)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(torch.ones(1, 3), None, None, EPS)


def test_inputs_of_less_precision_than_weights() -> None:
    """As under autocast."""
    x, weight, bias = inputs((8, 3, 4, 4), dtype=torch.float32)
    exact = derivatives(theirs, (x, weight, bias), 2)
    short = x.detach().bfloat16().requires_grad_()
    found = derivatives(mine, (short, weight, bias), 2)
    for value, other in zip(found, exact):
        assert (value.float() - other).norm() < 0.1 * other.norm()


def test_it_is_used_where_gradients_are_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return batch_norm(*arguments)

    monkeypatch.setattr(normalization, "batch_norm", counted)
    for first_order in (True, False):
        calls = 0
        make("maml", first_order=first_order, steps=2).meta_loss(episodes()).backward()
        assert (calls == 0) == first_order
