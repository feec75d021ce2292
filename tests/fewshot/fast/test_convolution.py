"""Convolutions and their derivatives, beside torch's, to the third; and the products of patches that GPUs run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.fewshot.fast import convolution as module
from learnedopt.fewshot.fast import vectorized
from learnedopt.fewshot.fast.convolution import Geometry, convolution
from learnedopt.fewshot.fast.vectorized import apply
from tests.fewshot.support import derivatives, generator

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


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[bool]] = []

    def counted(z: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: list[bool]) -> tuple[Tensor, Tensor]:
        calls.append(which)
        return gradients(z, x, weight, geometry, which)

    gradients = module._gradients
    monkeypatch.setattr(module, "_gradients", counted)
    x, weight, bias = (None if value is None else value.detach() for value in inputs(GEOMETRIES[0]))
    assert x is not None and weight is not None
    assert not convolution(x, weight, bias, GEOMETRIES[0]).requires_grad
    convolution(x.requires_grad_(), weight, bias, GEOMETRIES[0]).pow(2).sum().backward()
    convolution(x.detach(), weight.requires_grad_(), bias, GEOMETRIES[0]).pow(2).sum().backward()
    assert calls == [[True, False, False], [False, True, False]]


def test_under_autocast() -> None:
    """Dtypes are torch's, which leaves doubles alone; derivatives are near the exact ones, in the dtype of what they
    are of."""
    values = inputs(GEOMETRIES[1], dtype=torch.float32)
    exact = derivatives(theirs(GEOMETRIES[1]), values, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(GEOMETRIES[1])(*values).dtype == torch.bfloat16
        assert mine(GEOMETRIES[1])(*inputs(GEOMETRIES[1])).dtype == torch.float64
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
@pytest.mark.parametrize("shared", [(), ("0.weight",), ("0.bias",), ("0.weight", "0.bias")])
@pytest.mark.parametrize("episodes", [1, 4])
def test_where_groups_are_slow(
    episodes: int, shared: tuple[str, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, here on the CPU: products of patches, or where weights are shared, one convolution."""
    draw = generator(1)
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=bias)
    x = torch.randn(episodes, 5, 2, 7, 6, generator=draw)
    params = {
        f"0.{name}": torch.randn(episodes, *value.shape, generator=draw)
        for name, value in layer.named_parameters()
        if f"0.{name}" not in shared
    }
    expected = apply(nn.Sequential(layer), params, x)
    monkeypatch.setattr(vectorized, "_grouped", lambda device: False)
    torch.testing.assert_close(apply(nn.Sequential(layer), params, x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert apply(nn.Sequential(layer), params, x).dtype == torch.bfloat16
