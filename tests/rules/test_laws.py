"""What a schedule of ``lr`` does to the laws of step sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learnedopt import LearnedOptimizer
from learnedopt.rules import LawsConfig, LawsRule
from learnedopt.rules.laws import Row

RATES = [0.5, 2.0, 1.0, 0.25, 0.0, 0.02, 3.0]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("power", [0.0, 0.1, 1.0])
def test_of_what_lr_falls_below_its_largest_a_power_counts(power: float, as_tensor: bool) -> None:
    rule = LawsRule(LawsConfig(schedule_power=power)).double()
    statistics = torch.rand(len(Row), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, largest = {"peak": torch.zeros(2, dtype=torch.float64)}, 0.0
    for lr in RATES:
        largest = max(largest, lr)
        counted = largest * (lr / largest) ** power
        rate: float | Tensor = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
        rows, state = rule.with_lr(statistics, state, rate)
        assert state["peak"].tolist() == [largest, largest]
        expected = statistics.clone()
        expected[[Row.FROM_DIRECTION, Row.STEP]] *= counted
        if lr == 0.0:
            expected = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64).expand(-1, 2)
        else:  # the update will be multiplied by lr
            expected[[Row.FROM_OFFSET, Row.FROM_DIRECTION]] /= lr
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("rule", ["default", "light"])
def test_a_schedule_shortens_steps_by_a_power_of_it(rule: str, backend: str, as_tensor: bool) -> None:
    """The rules of the zoo take a tenth power: at a thousandth of the rate a step is half as long. Only where the rate
    has been that small from the start is a step a thousandth."""

    def moved(rates: list[float]) -> Tensor:
        g = torch.Generator().manual_seed(0)
        param = torch.randn(6, 5, generator=g).requires_grad_()
        optimizer = LearnedOptimizer([param], rule, rates[0], backend=backend)  # type: ignore[arg-type]
        grad = torch.randn(6, 5, generator=g)
        for lr in rates:
            before = param.detach().clone()
            optimizer.param_groups[0]["lr"] = torch.tensor(lr) if as_tensor else lr
            param.grad = grad.clone()
            optimizer.step()
        return param.detach() - before

    usual = float(moved([1.0, 1.0]).norm())
    late = float(moved([1.0, 1e-3]).norm()) / usual
    assert 0.4 < late < 1.0
    with pytest.warns(UserWarning, match="multiplies a learned update"):
        early = float(moved([1e-3, 1e-3]).norm()) / usual
    assert early == pytest.approx(1e-3, rel=0.02)
