"""What happens to gradients, and losses, that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learnedopt.kernels.core import blocks
from tests.optim.reference import (
    CASES,
    DTYPES,
    LAYOUTS,
    Case,
    draw_grads,
    draw_params,
    same_bits,
    snapshot,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
BAD = (math.inf, -math.inf, math.nan)


def spoil(param: Tensor, value: float) -> None:
    assert param.grad is not None
    param.grad.reshape(-1)[0:1].fill_(value)


@each_case
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from(BAD),
    where=st.sampled_from(["vector", "0-d", "transposed"]),
    block=st.sampled_from([4, 64]),
)
def test_a_skipped_step_changes_no_bit_and_the_next_goes_on(
    case: Case, seed: int, dtype: torch.dtype, bad: float, where: str, block: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    params = draw_params(g, list(LAYOUTS), dtype)
    twins = [param.detach().clone().requires_grad_() for param in params]
    optimizer, twin = case.build(params, nonfinite="skip", weight_decay=0.1), case.build(twins, weight_decay=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        for good in (True, False, True):
            draw_grads(g, params)
            before = snapshot(optimizer)
            if good:
                for param, other in zip(params, twins):
                    other.grad = param.grad
                twin.step(loss=1.0)
            else:
                spoil(params[list(LAYOUTS).index(where)], bad)
            optimizer.step(loss=1.0)
            assert same_bits(snapshot(optimizer), before) != good
    assert same_bits(snapshot(optimizer), snapshot(twin))


@each_case
def test_a_first_step_that_is_skipped_leaves_the_state_at_its_start(case: Case) -> None:
    params = draw_params(torch.Generator().manual_seed(0), ["vector"])
    before = params[0].detach().clone()
    optimizer = case.build(params, nonfinite="skip")
    params[0].grad = torch.full((7,), math.nan)
    optimizer.step(loss=1.0)
    assert torch.equal(params[0], before)
    for name, entry in optimizer.state[params[0]].items():
        assert torch.equal(entry, before if name == "origin" else torch.zeros_like(entry))


@each_case
@pytest.mark.parametrize("bad", BAD)
def test_raising_names_the_parameters_and_changes_nothing(case: Case, bad: float) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = case.optimizer(net.named_parameters(), case.rule(), nonfinite="raise")
    params: list[Tensor] = list(net.parameters())
    for _ in range(2):
        draw_grads(torch.Generator().manual_seed(0), params)
        optimizer.step(loss=1.0)
    before = snapshot(optimizer)
    spoil(params[2], bad)
    spoil(params[3], bad)
    with pytest.raises(RuntimeError, match=r"^not finite: the gradient of 1\.weight, the gradient of 1\.bias\. No "):
        optimizer.step(loss=1.0)
    assert same_bits(snapshot(optimizer), before)
    unnamed = case.build(params, nonfinite="raise")
    with pytest.raises(RuntimeError, match="not finite: the gradient of parameter 2, the gradient of parameter 3"):
        unnamed.step(loss=1.0)


@each_case
def test_by_default_it_propagates_as_in_adam(case: Case) -> None:
    params = draw_params(torch.Generator().manual_seed(0), ["vector", "matrix"])
    optimizer = case.build(params)
    draw_grads(torch.Generator().manual_seed(0), params)
    spoil(params[0], math.nan)
    optimizer.step(loss=1.0)
    assert params[0][0].isnan() and params[1].isfinite().all()


def test_a_loss_that_a_rule_reads_counts_as_well() -> None:
    params = draw_params(torch.Generator().manual_seed(0), ["vector"])
    draw_grads(torch.Generator().manual_seed(0), params)
    skipping, raising = (CASES["meta-lstm"].build(params, nonfinite=policy) for policy in ("skip", "raise"))
    before = params[0].detach().clone()
    skipping.step(loss=math.nan)
    with pytest.raises(RuntimeError, match="not finite: the loss"):
        raising.step(loss=math.inf)
    assert same_bits([params[0].detach()], [before])
    deaf = CASES["lstm"].build(params, nonfinite="skip")
    deaf.step(loss=math.nan)
    assert not torch.equal(params[0], before)


def test_groups_that_skip_skip_together_and_the_others_go_on() -> None:
    params = draw_params(torch.Generator().manual_seed(0), ["vector"] * 4)
    before = [param.detach().clone() for param in params]
    groups: list[dict[str, Any]] = [
        {"params": params[0]},
        {"params": params[1], "nonfinite": "raise"},
        {"params": params[2], "nonfinite": "propagate"},
    ]
    optimizer = CASES["trace"].optimizer(groups, CASES["trace"].rule(), nonfinite="skip")
    optimizer.add_param_group({"params": params[3]})
    assert [group["nonfinite"] for group in optimizer.param_groups] == ["skip", "raise", "propagate", "skip"]
    draw_grads(torch.Generator().manual_seed(0), params)
    spoil(params[3], math.nan)
    optimizer.step()
    assert [torch.equal(param, value) for param, value in zip(params, before)] == [True, False, False, True]


def test_another_word_is_refused() -> None:
    params = draw_params(torch.Generator(), ["vector"])
    with pytest.raises(ValueError, match=r"nonfinite must be one of \('propagate', 'skip', 'raise'\), got 'ignore'"):
        CASES["trace"].build(params, nonfinite="ignore")
