"""State in fewer bits, in the optimizers: asked for, saved, loaded, converted."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from learnedopt import LearnedOptimizer
from learnedopt.kernels import BackendName, read_state, state_layout
from tests.optim.reference import CASES, LAYOUTS, Case, draw_grads, draw_params, same_bits, snapshot
from tests.optim.test_state_dict import go_on, through_a_file

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8], ids=str)


def started(case: Case, state_dtype: torch.dtype, backend: BackendName = "auto") -> tuple[Any, torch.Generator]:
    """An optimizer after two steps."""
    generator = torch.Generator().manual_seed(0)
    params = draw_params(generator, list(LAYOUTS))
    optimizer = case.build(params, state_dtype=state_dtype, backend=backend)
    go_on(optimizer, generator, 2)
    return optimizer, generator


def twin_of(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin


@each_case
@each_dtype
def test_state_is_kept_as_asked(case: Case, state_dtype: torch.dtype) -> None:
    optimizer, _ = started(case, state_dtype)
    group = optimizer.param_groups[0]
    assert group["state_dtype"] == str(state_dtype).removeprefix("torch.")
    layout = state_layout(case.rule(), torch.float32, group["state_dtype"])
    assert state_dtype in {spec.dtype for spec in layout.values()}
    for param in group["params"]:
        coordinates = case.rule().coordinates
        own = {} if coordinates is None else coordinates.initial(param.shape, torch.float32, None)
        assert {name: (value.dtype, value.shape) for name, value in optimizer.state[param].items()} == {
            **{
                name: (spec.dtype, spec.shape + (param.shape if spec.scope == "coordinate" else ()))
                for name, spec in layout.items()
            },
            **{name: (value.dtype, value.shape) for name, value in own.items()},
        }


@each_case
@each_dtype
def test_resumed_training_is_the_same_to_the_last_bit(case: Case, state_dtype: torch.dtype) -> None:
    optimizer, generator = started(case, state_dtype)
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    resumed = case.build(params, state_dtype=state_dtype)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_bits(snapshot(resumed), snapshot(optimizer))
    assert same_bits(go_on(resumed, twin_of(generator), 3), go_on(optimizer, generator, 3))


@each_case
@each_dtype
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_the_same(case: Case, state_dtype: torch.dtype, way: Any) -> None:
    optimizer, generator = started(case, state_dtype, "reference")
    twin = way(optimizer)
    assert twin.backend == "reference"
    assert same_bits(go_on(twin, twin_of(generator), 2), go_on(optimizer, generator, 2))


@each_case
@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_loading_converts_to_what_this_optimizer_was_asked_for(
    case: Case, saved_as: torch.dtype, state_dtype: torch.dtype
) -> None:
    optimizer, generator = started(case, saved_as)
    saved = optimizer.state_dict()
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    other = case.build(params, state_dtype=state_dtype)
    other.load_state_dict(saved)
    assert other.param_groups[0]["state_dtype"] == str(state_dtype).removeprefix("torch.")
    spec = case.rule().state_spec()
    for index, param in enumerate(params):
        read = [
            read_state(
                {
                    name: state[name].reshape(*spec.shape, -1)  # flat, as a rule takes it
                    for name, spec in layout.items()
                },
                spec,
                torch.float32,
            )
            for state, layout in (
                (other.state[param], state_layout(case.rule(), torch.float32, other.param_groups[0]["state_dtype"])),
                (
                    saved["state"][index],
                    state_layout(case.rule(), torch.float32, saved["param_groups"][0]["state_dtype"]),
                ),
            )
        ]
        for name in spec:
            torch.testing.assert_close(read[0][name], read[1][name], rtol=2e-2, atol=2e-2)
    go_on(other, generator, 1)


@each_dtype
def test_a_checkpoint_from_before_the_option_is_converted(state_dtype: torch.dtype) -> None:
    optimizer, generator = started(CASES["lstm"], torch.float32)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["state_dtype"]
    params = [param.detach().clone().requires_grad_() for param in optimizer.param_groups[0]["params"]]
    other = CASES["lstm"].build(params, state_dtype=state_dtype)
    other.load_state_dict(saved)
    assert other.state[params[0]]["h"].dtype == state_dtype
    go_on(other, generator, 1)


@each_dtype
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_keeps_every_bit(state_dtype: torch.dtype, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build() -> tuple[nn.Module, LearnedOptimizer]:
        net = nn.Linear(3, 2)
        return net, LearnedOptimizer(net.parameters(), CASES["adam-lstm"].rule(), state_dtype=state_dtype)

    net, optimizer = build()
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    other_net, other = build()
    other_net.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other_net, other, saved, options=options)
    assert same_bits(snapshot(other), snapshot(optimizer))


@each_case
@each_dtype
def test_a_skipped_step_changes_no_bit(case: Case, state_dtype: torch.dtype) -> None:
    optimizer, generator = started(case, state_dtype)
    optimizer.param_groups[0]["nonfinite"] = "skip"
    draw_grads(generator, optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["params"][0].grad[0] = torch.nan
    before = snapshot(optimizer)
    optimizer.step(loss=1.0)
    assert same_bits(snapshot(optimizer), before)


def test_each_group_may_ask_for_its_own() -> None:
    params = draw_params(torch.Generator(), ["vector", "matrix"])
    groups: list[dict[str, Any]] = [{"params": params[:1], "state_dtype": torch.int8}, {"params": params[1:]}]
    optimizer = LearnedOptimizer(groups, CASES["lstm"].rule(), state_dtype=torch.bfloat16)
    draw_grads(torch.Generator(), params)
    optimizer.step()
    assert [optimizer.state[param]["h"].dtype for param in params] == [torch.int8, torch.bfloat16]


@pytest.mark.parametrize("bad", [torch.float16, torch.float64, "int4", None])
def test_other_dtypes_are_refused_for_the_optimizer_and_for_a_group(bad: Any) -> None:
    params = draw_params(torch.Generator(), ["vector"])
    with pytest.raises(ValueError, match=r"state_dtype must be one of .*int8.* of torch"):
        CASES["lstm"].build(params, state_dtype=bad)
    with pytest.raises(ValueError, match=r"state_dtype must be one of"):
        CASES["lstm"].build([{"params": params, "state_dtype": bad}])  # type: ignore[list-item]
