"""Convolutions and their derivatives, beside torch's, to the third; and the products of patches that GPUs run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.fewshot import vectorized
from learnedopt.fewshot.convolution import Geometry, convolution
from learnedopt.fewshot.vectorized import apply
from tests.fewshot.support import generator

GEOMETRIES = [
    Geometry(),
    Geometry(stride=(2, 2), padding=(1, 1)),
    Geometry(padding=(0, 1), dilation=(2, 1), groups=3),
    Geometry(stride=(1, 3), padding=(2, 0), groups=3),
]
Inputs = tuple[Tensor, Tensor, Tensor | None]
Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def mine(geometry: Geometry) -> Convolve:
    return lambda x, weight, bias: convolution(x, weight, bias, geometry)


def theirs(geometry: Geometry) -> Convolve:
    g = geometry
    return lambda x, weight, bias: F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def inputs(geometry: Geometry, bias: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    draw = generator(3)
    shapes = [(2, 3, 6, 7), (6, 3 // geometry.groups, 3, 2), (6,)]
    x, weight, offset = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return x.requires_grad_(), weight.requires_grad_(), offset.requires_grad_() if bias else None


def derivatives(convolve: Convolve, values: Inputs, order: int) -> list[Tensor]:
    """The derivatives by all inputs of a function of the outputs, of a function of these derivatives, and so on."""
    wanted = [value for value in values if value is not None]
    found = [convolve(*values)]
    for _ in range(order):
        total = torch.stack(
            [(value * torch.linspace(-1.0, 2.0, value.numel()).view(value.shape)).pow(3).sum() for value in found]
        )
        found = list(torch.autograd.grad(total.sum(), wanted, create_graph=True))
    return found


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_derivatives(geometry: Geometry, bias: bool, order: int) -> None:
    found = derivatives(mine(geometry), inputs(geometry, bias), order)
    torch.testing.assert_close(found, derivatives(theirs(geometry), inputs(geometry, bias), order))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_second_derivatives_of_each_gradient_alone(geometry: Geometry, which: int) -> None:
    x, weight, bias = inputs(geometry)
    assert bias is not None

    def one(*values: Tensor) -> Tensor:
        with torch.enable_grad():
            total = mine(geometry)(*values).pow(3).sum()
            return torch.autograd.grad(total, values, create_graph=True)[which]

    assert torch.autograd.gradcheck(one, (x, weight, bias))
    assert torch.autograd.gradgradcheck(one, (x, weight, bias))


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, weight, bias = (None if value is None else value.detach() for value in inputs(GEOMETRIES[0]))
    assert x is not None and weight is not None
    for value in (x, weight):
        value.requires_grad_()
        convolution(x, weight, bias, GEOMETRIES[0]).pow(2).sum().backward()
        expected = theirs(GEOMETRIES[0])(x, weight, bias).pow(2).sum()
        torch.testing.assert_close(value.grad, torch.autograd.grad(expected, value)[0])
        value.requires_grad_(False)
        value.grad = None
    assert not convolution(x, weight, bias, GEOMETRIES[0]).requires_grad


def test_under_autocast() -> None:
    """The dtype is torch's; the derivatives are near the exact ones, and in the dtypes of what they are of."""
    values = inputs(GEOMETRIES[1], dtype=torch.float32)
    exact = derivatives(theirs(GEOMETRIES[1]), values, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(GEOMETRIES[1])(*values).dtype == torch.bfloat16
        found = derivatives(mine(GEOMETRIES[1]), values, 2)
    for value, other in zip(found, exact):
        assert value.dtype == other.dtype
        assert (value - other).norm() < 0.1 * other.norm()


def test_under_vmap() -> None:
    x, weight, bias = (None if value is None else value.detach() for value in inputs(GEOMETRIES[1]))
    assert x is not None and weight is not None
    weights = torch.stack([weight, 2 * weight])

    def second(convolve: Convolve) -> Callable[[Tensor], Tensor]:
        def first(weight: Tensor) -> Tensor:
            return torch.func.grad(lambda weight: convolve(x, weight, bias).pow(3).sum())(weight)

        return torch.func.grad(lambda weight: first(weight).pow(2).sum())

    found = torch.func.vmap(second(mine(GEOMETRIES[1])))(weights)
    torch.testing.assert_close(found, torch.stack([second(theirs(GEOMETRIES[1]))(weight) for weight in weights]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shared", "episodes"), [(True, 4), (False, 4), (False, 1)])
def test_where_groups_are_slow(shared: bool, episodes: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, here on the CPU: products of patches, or where weights are shared, one convolution."""
    draw = generator(1)
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=bias, dtype=torch.float64)
    x = torch.randn(episodes, 5, 2, 7, 6, generator=draw, dtype=torch.float64)
    params = {
        f"0.{name}": torch.randn(episodes, *value.shape, generator=draw, dtype=torch.float64)
        for name, value in layer.named_parameters()
    }
    params = {} if shared else params
    expected = apply(nn.Sequential(layer), params, x)
    monkeypatch.setattr(vectorized, "_grouped", lambda device: False)
    torch.testing.assert_close(apply(nn.Sequential(layer), params, x), expected)
