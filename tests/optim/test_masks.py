"""Elements whose gradients are masked stay where they are, where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.kernels.bases import step as bases
from learnedopt.kernels.chain import blocked as chain_blocked
from tests.optim.reference import (
    CASES,
    DTYPES,
    KINDS,
    LAYOUTS,
    Case,
    chain,
    draw_grads,
    draw_params,
    in_bases,
    same_bits,
    trained,
)

each_case = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_masks(params: list[Tensor], seed: int) -> list[Tensor]:
    """Of each tensor, about half of the elements, in no order."""
    g = generator(seed)
    return [torch.rand(param.shape, generator=g) < 0.5 for param in params]


def masked_step(optimizer: LearnedOptimizer, masks: list[Tensor], seed: int) -> None:
    params = optimizer.param_groups[0]["params"]
    draw_grads(generator(seed), params)
    for param, mask in zip(params, masks):
        param.grad[mask] = 0.0
    optimizer.step(loss=1.0)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_from_the_start_never_moves(case: Case, dtype: torch.dtype) -> None:
    params = draw_params(generator(), list(LAYOUTS), dtype)
    before = [param.detach().clone() for param in params]
    masks = draw_masks(params, seed=1)
    optimizer = case.build(params, mask_zero_gradients=True, weight_decay=0.01)
    for seed in range(5):
        masked_step(optimizer, masks, seed)
    for param, old, mask in zip(params, before, masks):
        assert same_bits([param.detach()[mask]], [old[mask]])
    assert all(bool((param != old)[~mask].any()) for param, old, mask in zip(params, before, masks) if (~mask).any())


@each_case
def test_what_is_masked_later_stays_in_that_step(case: Case) -> None:
    """By then a rule has a momentum, which would go on."""
    params = draw_params(generator(), list(LAYOUTS))
    none = [torch.zeros(param.shape, dtype=torch.bool) for param in params]
    optimizer = case.build(params, mask_zero_gradients=True, weight_decay=0.01, maximize=True)
    for seed in range(3):
        masked_step(optimizer, none, seed)
    before = [param.detach().clone() for param in params]
    masks = draw_masks(params, seed=1)
    masked_step(optimizer, masks, seed=3)
    for param, old, mask in zip(params, before, masks):
        assert same_bits([param.detach()[mask]], [old[mask]])
    masked_step(optimizer, none, seed=4)
    assert all(bool((param != old)[mask].all()) for param, old, mask in zip(params, before, masks))


@each_case
def test_everything_else_is_what_it_is_without_masking(case: Case) -> None:
    results = []
    for masking in (False, True):
        params = draw_params(generator(), list(LAYOUTS))
        masks = draw_masks(params, seed=1)
        optimizer = case.build(params, mask_zero_gradients=masking, weight_decay=0.01)
        masked_step(optimizer, masks, seed=0)
        state = [value for param in params for value in optimizer.state[param].values()]
        results.append(([param.detach()[~mask] for param, mask in zip(params, masks)], state))
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
def test_a_large_matrix_in_strips_keeps_its_masked_elements(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "AT_ONCE", 25)
    monkeypatch.setattr(bases, "STRIP", 17)
    taken: list[object] = []
    in_strips = bases._step_in_strips

    def noticed(*args: Any) -> None:
        taken.append(args)
        in_strips(*args)

    monkeypatch.setattr(bases, "_step_in_strips", noticed)
    params = [torch.randn(shape, generator=generator()).requires_grad_() for shape in ((20, 5), (6, 30))]
    params.append(torch.randn(3, 14, generator=generator()).t().requires_grad_())
    before = [param.detach().clone() for param in params]
    masks = draw_masks(params, seed=1)
    rule = trained(in_bases(settling=2, interval=2, max_side=6), scale=0.1)
    optimizer = LearnedOptimizer(params, rule, mask_zero_gradients=True, backend=backend)  # type: ignore[arg-type]
    for seed in range(4):
        masked_step(optimizer, masks, seed)
    assert taken
    for param, old, mask in zip(params, before, masks):
        assert same_bits([param.detach()[mask]], [old[mask]])
        assert bool((param != old)[~mask].all())


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
def test_a_large_matrix_of_a_chain_keeps_its_masked_elements(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, pieces and the whole step in one call."""
    monkeypatch.setattr(chain_blocked, "TILE", 25)
    monkeypatch.setattr(chain_blocked, "PIECE", 17)
    params = [torch.randn(shape, generator=generator()).requires_grad_() for shape in ((20, 5), (6, 30), (40,))]
    params.append(torch.randn(3, 14, generator=generator()).t().requires_grad_())
    before = [param.detach().clone() for param in params]
    masks = draw_masks(params, seed=1)
    optimizer = KINDS["chain"].build(params, mask_zero_gradients=True, backend=backend, weight_decay=0.01)
    for seed in range(4):
        masked_step(optimizer, masks, seed)
    for param, old, mask in zip(params, before, masks):
        assert same_bits([param.detach()[mask]], [old[mask]])
        assert bool((param != old)[~mask].all())


def test_masked_groups_are_not_averaged() -> None:
    """The average of what is masked is not where it is held."""
    params = draw_params(generator(), ["matrix", "vector"])
    masked, free = ({"params": [param], "mask_zero_gradients": asked} for param, asked in zip(params, (True, False)))
    optimizer = LearnedOptimizer([masked, free], trained(chain(), scale=0.1))
    for _ in range(3):
        draw_grads(generator(), params)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    with optimizer.averaged_parameters():
        assert same_bits([params[0].detach()], before[:1])
        assert not torch.equal(params[1].detach(), before[1])


@pytest.mark.parametrize("rule", ["default", "light"])
def test_pruned_weights_stay_zero_under_the_rules_of_the_zoo(rule: str) -> None:
    """The mask is a hook on the gradient, as pruning has it."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    mask = torch.rand(8, 6, generator=generator()) < 0.5
    with torch.no_grad():
        net[0].weight[~mask] = 0.0  # type: ignore[operator]
    net[0].weight.register_hook(lambda grad: grad * mask)  # type: ignore[operator]
    optimizer = LearnedOptimizer(net.parameters(), rule, mask_zero_gradients=True)
    for seed in range(30):
        optimizer.zero_grad()
        net(torch.randn(16, 6, generator=generator(seed))).square().mean().backward()
        optimizer.step()
    assert isinstance(net[0].weight, Tensor)
    assert torch.equal(net[0].weight != 0.0, mask)


def test_a_complex_element_stays_where_both_parts_are_masked() -> None:
    param = torch.randn(3, 4, dtype=torch.complex64, generator=generator()).requires_grad_()
    before, mask = param.detach().clone(), torch.rand(3, 4, generator=generator(1)) < 0.5
    optimizer = CASES["eigenbasis"].build([param], mask_zero_gradients=True)
    for seed in range(3):
        param.grad = torch.randn(3, 4, dtype=torch.complex64, generator=generator(seed)) * ~mask
        optimizer.step()
    assert torch.equal(torch.eq(param, before), mask)


def test_groups_mask_each_for_itself_and_states_say_so() -> None:
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params[:1], "mask_zero_gradients": True}, {"params": params[1:]}]
    optimizer = LearnedOptimizer(groups, CASES["lstm"].rule())
    for param in params:
        param.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(params[0], torch.ones(3)) and not torch.equal(params[1], torch.ones(3))
    saved = optimizer.state_dict()
    assert [group["mask_zero_gradients"] for group in saved["param_groups"]] == [True, False]
    with pytest.raises(ValueError, match="mask_zero_gradients must be True or False, got 1"):
        LearnedOptimizer(params, CASES["lstm"].rule(), mask_zero_gradients=1)  # type: ignore[arg-type]
