"""Optimizers survive being saved, loaded, copied and pickled, and know which rule their state belongs to."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from learnedopt import LearnedOptimizer, LSTMOptimizer
from learnedopt.rules import LSTMConfig, LSTMRule
from learnedopt.rules.coordinates import AGE
from tests.optim.reference import (
    CASES,
    DTYPES,
    LAYOUTS,
    Case,
    devices_of_state,
    draw_grads,
    draw_params,
    same_bits,
    snapshot,
    trained,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def started(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[LearnedOptimizer, torch.Generator]:
    """An optimizer after two steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = case.build(draw_params(generator, list(LAYOUTS), dtype), lr=0.5, weight_decay=0.01)
    go_on(optimizer, generator, 2)
    return optimizer, generator


def go_on(optimizer: LearnedOptimizer, generator: torch.Generator, steps: int) -> list[Tensor]:
    for _ in range(steps):
        draw_grads(generator, optimizer.param_groups[0]["params"])
        optimizer.step(loss=0.5)
    return snapshot(optimizer)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@each_case
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES))
def test_resumed_training_is_the_same_to_the_last_bit(case: Case, seed: int, dtype: torch.dtype) -> None:
    optimizer, generator = started(case, seed, dtype)
    saved = through_a_file(optimizer.state_dict())
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    resumed = case.build(params)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 0.5
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    assert same_bits(go_on(resumed, twin, 3), go_on(optimizer, generator, 3))


@each_case
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_rule_and_go_on_the_same(case: Case, way: Any) -> None:
    optimizer, generator = started(case)
    optimizer.observe(0.25)
    twin = way(optimizer)
    assert type(twin) is case.optimizer
    assert all(a is not b for a, b in zip(twin.param_groups[0]["params"], optimizer.param_groups[0]["params"]))
    other = torch.Generator()
    other.set_state(generator.get_state())
    assert same_bits(go_on(twin, other, 2), go_on(optimizer, generator, 2))
    twin.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert twin.param_groups[1]["rule_sha256"] == optimizer.param_groups[0]["rule_sha256"]


def test_the_state_dict_holds_tensors_and_plain_values_only() -> None:
    for case in CASES.values():
        state_dict = started(case)[0].state_dict()
        entries = [value for state in state_dict["state"].values() for value in state.values()]
        assert all(isinstance(value, Tensor) for value in entries)
        options = {key: type(value) for key, value in state_dict["param_groups"][0].items()}
        assert options == {
            "params": list,
            "lr": float,
            "weight_decay": float,
            "maximize": bool,
            "mask_zero_gradients": bool,
            "nonfinite": str,
            "state_dtype": str,
            "together": type(None),
            "rule": str,
            "rule_sha256": str,
        }


@each_case
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("saved_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_loading_keeps_the_precision_of_state(case: Case, saved_dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    saved = started(case, dtype=saved_dtype)[0].state_dict()
    params = draw_params(torch.Generator(), list(LAYOUTS), param_dtype)
    optimizer = case.build(params)
    optimizer.load_state_dict(saved)
    expected = torch.float64 if param_dtype == torch.float64 else torch.float32
    for index, param in enumerate(params):
        for name, value in saved["state"][index].items():
            found = optimizer.state[param][name]
            assert found.dtype == (torch.int64 if name == AGE else expected)
            assert torch.equal(found, value.to(found.dtype))


@each_case
def test_loading_shares_no_memory_and_can_be_repeated(case: Case) -> None:
    optimizer, generator = started(case)
    saved = copy.deepcopy(optimizer.state_dict())
    pristine = copy.deepcopy(saved)
    for _ in range(2):
        optimizer.load_state_dict(saved)
        go_on(optimizer, generator, 1)
        for index, entries in pristine["state"].items():
            assert same_bits(list(saved["state"][index].values()), list(entries.values()))
        assert saved["param_groups"] == pristine["param_groups"]


@each_case
def test_state_moves_to_the_device_of_its_parameter(case: Case) -> None:
    params = [
        nn.Parameter(torch.empty_like(param, device="meta")) for param in started(case)[0].param_groups[0]["params"]
    ]
    optimizer = case.build([*params])
    optimizer.load_state_dict(started(case)[0].state_dict())
    assert devices_of_state(optimizer, params) == {"meta"}


def test_the_state_of_another_rule_is_refused_by_name_and_fingerprint() -> None:
    def optimizer(seed: int) -> LSTMOptimizer:
        params = draw_params(torch.Generator().manual_seed(0), ["vector"])
        draw_grads(torch.Generator(), params)
        return LSTMOptimizer(params, trained(LSTMRule(LSTMConfig(hidden_size=4)), seed))

    one, other = optimizer(0), optimizer(1)
    other.step()
    before = snapshot(one)
    first, second = (x.param_groups[0]["rule_sha256"] for x in (other, one))
    with pytest.raises(ValueError, match=f"made with rule 'lstm' .sha256 {first}.* runs 'lstm' .sha256 {second}"):
        one.load_state_dict(other.state_dict())
    adam = torch.optim.Adam(draw_params(torch.Generator(), ["vector"]))
    with pytest.raises(ValueError, match="not the state of a learned optimizer"):
        one.load_state_dict(adam.state_dict())
    assert same_bits(snapshot(one), before)
    other.load_state_dict(other.state_dict())  # nothing of the failed loads is left behind


def test_groups_that_do_not_match_are_refused() -> None:
    one, two = (CASES["trace"].build(draw_params(torch.Generator(), ["vector"] * n)) for n in (1, 2))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        one.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        two.load_state_dict({"state": {}, "param_groups": two.state_dict()["param_groups"] * 2})


@each_case
def test_state_of_other_shapes_is_refused_by_name(case: Case) -> None:
    net, turned = (nn.Linear(*sizes, bias=False) for sizes in ((3, 2), (2, 3)))
    optimizer, other = (case.optimizer(x.named_parameters(), case.rule()) for x in (net, turned))
    for model, sizes in ((net, 3), (turned, 2)):
        model(torch.ones(sizes)).sum().backward()
    for each in (optimizer, other):
        each.step(loss=1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^weight has shape \(2, 3\).*load has .* 3, 2\).* in the same order"):
        optimizer.load_state_dict(other.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].popitem()
    with pytest.raises(ValueError, match="weight has shape"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(optimizer), before)


def test_a_checkpoint_without_newer_options_loads_and_leaves_them_as_constructed() -> None:
    optimizer, generator = started(CASES["trace"])
    saved = optimizer.state_dict()
    newer = ("maximize", "nonfinite", "together", "mask_zero_gradients")
    for key in newer:
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    go_on(optimizer, generator, 1)
    assert [optimizer.param_groups[0][key] for key in newer] == [False, "propagate", None, False]
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    asked = CASES["trace"].build(params, nonfinite="skip")
    asked.load_state_dict(saved)
    assert asked.param_groups[0]["nonfinite"] == "skip"


def test_an_optimizer_pickled_before_newer_options_unpickles() -> None:
    optimizer, generator = started(CASES["trace"])
    state = copy.deepcopy(optimizer.__getstate__())
    for options in (state["defaults"], *state["param_groups"]):
        for key in ("maximize", "nonfinite", "together", "mask_zero_gradients"):
            del options[key]
    old = LearnedOptimizer.__new__(LearnedOptimizer)
    old.__setstate__(state)
    other = torch.Generator()
    other.set_state(generator.get_state())
    assert same_bits(go_on(old, other, 1), go_on(optimizer, generator, 1))
    old.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert [group["nonfinite"] for group in old.param_groups] == ["propagate"] * 2


def test_hooks_of_the_user_see_and_change_what_is_loaded() -> None:
    optimizer, _ = started(CASES["trace"])
    param = optimizer.param_groups[0]["params"][0]
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)  # leaves nothing behind that would come before hooks registered later
    seen: list[Tensor] = []

    def zero_first(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        zeros = {name: torch.zeros_like(value) for name, value in state_dict["state"][0].items()}
        return {**state_dict, "state": {**state_dict["state"], 0: zeros}}

    optimizer.register_load_state_dict_pre_hook(zero_first)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[param]["last"]))
    optimizer.load_state_dict(saved)
    assert torch.equal(seen[0], torch.zeros_like(param))


@each_case
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_keeps_everything(case: Case, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build() -> tuple[nn.Module, LearnedOptimizer]:
        net = nn.Linear(3, 2, dtype=torch.bfloat16)
        return net, case.optimizer(net.parameters(), case.rule())

    net, optimizer = build()
    net(torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(loss=1.0)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    other_net, other = build()
    other_net.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other_net, other, saved, options=options)
    assert same_bits(snapshot(other), snapshot(optimizer))
    assert other.param_groups[0]["rule_sha256"] == optimizer.param_groups[0]["rule_sha256"]


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("lr", -1.0, "Invalid learning rate"),
        ("lr", float("nan"), "Invalid learning rate"),
        ("weight_decay", float("inf"), "Invalid weight_decay"),
        ("nonfinite", "hope", "nonfinite must be one of"),
        ("maximize", "yes", "maximize must be True or False"),
        ("state_dtype", "float8", "state_dtype must be one of"),
        ("lr", None, r"lacks \['lr'\]"),
    ],
)
def test_options_that_no_group_may_have_are_refused_when_loaded(option: str, value: object, problem: str) -> None:
    optimizer, _ = started(CASES["lstm"])
    saved, kept = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer)
    if value is None:
        del saved["param_groups"][0][option]
    else:
        saved["param_groups"][0][option] = value
    with pytest.raises(ValueError, match=f"parameter group 0.*{problem}"):
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(optimizer), kept)


def test_the_state_of_another_optimizer_is_refused_in_a_sentence() -> None:
    optimizer, _ = started(CASES["lstm"])
    adam = torch.optim.Adam(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"not the state of a learned optimizer .*'betas'"):
        optimizer.load_state_dict(adam.state_dict())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@each_case
def test_what_wrappers_keep_in_the_state_comes_back(case: Case, state_dtype: torch.dtype) -> None:
    """A number for all parameters, as some wrappers have, and a slow copy of each, as Lookahead has."""
    optimizer, generator = started(case)
    params = optimizer.param_groups[0]["params"]
    optimizer.state["global"] = {"scale": torch.tensor(0.25), "steps": 7}  # type: ignore[index]
    for param in params:
        optimizer.state[param]["slow_buffer"] = param.detach().clone()
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = case.build([param.detach().clone().requires_grad_() for param in params], state_dtype=state_dtype)
    fresh.load_state_dict(saved)
    assert fresh.state["global"] == {"scale": torch.tensor(0.25), "steps": 7}  # type: ignore[index]
    for param, other in zip(params, fresh.param_groups[0]["params"], strict=True):
        assert torch.equal(fresh.state[other]["slow_buffer"], param)
    go_on(fresh, generator, 1)
    assert "slow_buffer" in fresh.state_dict()["state"][0]
