from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learnedopt.rules import log_sign
from tests.rules import reference
from tests.rules.support import property_test

DTYPES = [torch.float32, torch.float64]
RANGES = [1.0, 5.0, 7.3, 10.0, 30.0]


def expected(x: Tensor, p: float) -> Tensor:
    return torch.tensor([reference.log_sign(value, p) for value in x.tolist()], dtype=torch.float64).T


def assert_log_sign(x: Tensor, p: float) -> None:
    """Both channels to a few units in the last place: the threshold itself is rounded when it enters the dtype."""
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(log_sign(x, p).double(), expected(x, p), rtol=4 * eps, atol=2 * eps / p)


@pytest.mark.parametrize("p", RANGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_is_exact(dtype: torch.dtype, p: float) -> None:
    # Seventeen of them, so that the vectorised loop and its remainder are both taken.
    log, sign = log_sign(torch.zeros(17, dtype=dtype), p)
    assert (log == -1.0).all()
    assert (sign == 0.0).all()


@pytest.mark.parametrize("p", RANGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_and_its_neighbours(dtype: torch.dtype, p: float) -> None:
    threshold = torch.tensor([math.exp(-p)], dtype=dtype)
    x = torch.cat([threshold, torch.nextafter(threshold, 0 * threshold), torch.nextafter(threshold, 2 * threshold)])
    x = torch.cat([x, -x])
    assert_log_sign(x, p)
    log, sign = log_sign(x, p)
    assert (log >= -1.0).all()
    assert (sign.abs() <= 1.0).all()
    assert torch.equal(sign.sign(), x.sign())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_and_extremes(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    magnitudes = [
        info.smallest_normal,
        info.smallest_normal / 8,
        info.smallest_normal * info.eps,
        1e-30,
        1e30,
        info.max,
    ]
    x = torch.tensor([sign * value for value in magnitudes for sign in (1, -1)], dtype=dtype)
    assert (x != 0).all()
    assert_log_sign(x, 10.0)


def test_double_precision_is_kept() -> None:
    log, _ = log_sign(torch.tensor([1.0 + 1e-12], dtype=torch.float64))
    assert log.item() == pytest.approx(1e-13, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@property_test
@given(data=st.data())
def test_any_value_and_range(dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32 if dtype == torch.float32 else 64)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=9)), dtype=dtype)
    assert_log_sign(x, data.draw(st.sampled_from(RANGES)))


@pytest.mark.parametrize("p", RANGES)
def test_channels_are_continuous_and_monotone_across_the_threshold(p: float) -> None:
    x = math.exp(-p) * torch.linspace(0.99, 1.01, 2001, dtype=torch.float64)
    log, sign = log_sign(x, p)
    # The steepest channel has slope e^p, so neighbours 1e-5 e^-p apart may differ by 1e-5.
    for channel in (log, sign):
        assert (channel.diff() >= 0).all()
        assert (channel.diff() <= 1.01e-5).all()


def test_odd_sign_and_even_magnitude() -> None:
    x = torch.logspace(-12, 3, 100, dtype=torch.float64)
    (log, sign), (log_negative, sign_negative) = log_sign(x), log_sign(-x)
    assert torch.equal(log, log_negative)
    assert torch.equal(sign, -sign_negative)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_derivatives_are_finite_everywhere(dtype: torch.dtype) -> None:
    t = math.exp(-10.0)
    x = torch.tensor([0.0, -0.0, 1e-40, 1e-30, t, -t, 1.0, 1e30, torch.finfo(dtype).max], dtype=dtype).requires_grad_()
    for channel in (0, 1):
        (grad,) = torch.autograd.grad(log_sign(x)[channel].sum(), x)
        assert grad.isfinite().all()


def test_derivatives_of_both_branches() -> None:
    x = torch.tensor([1e-6, -1e-6, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    (log_grad,) = torch.autograd.grad(log_sign(x)[0].sum(), x)
    (sign_grad,) = torch.autograd.grad(log_sign(x)[1].sum(), x)
    torch.testing.assert_close(log_grad, torch.tensor([0.0, 0.0, 0.2, -0.2], dtype=torch.float64))
    linear = math.exp(10.0)
    torch.testing.assert_close(sign_grad, torch.tensor([linear, linear, 0.0, 0.0], dtype=torch.float64))


def test_shape_gains_a_leading_axis_of_two() -> None:
    assert log_sign(torch.zeros(3, 4)).shape == (2, 3, 4)
