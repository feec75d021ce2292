"""What two processes do together and check, on CPU over gloo.

Each process runs this file as a script: ``python -m tests.distributed.scenarios RANK FOLDER``. It goes through all
scenarios, which spares starting two processes for each, and writes what came of them to ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from learnedopt import LearnedOptimizer, MetaLSTMOptimizer
from learnedopt.kernels.core import blocks
from learnedopt.kernels.core.blocked import BlockedBackend
from learnedopt.kernels.core.native import NativeBackend
from learnedopt.rules import ChainRule, MetaLSTMConfig, MetaLSTMRule
from learnedopt.rules.coordinates import AGE
from tests.optim.reference import CASES, KINDS, Case, TraceRule, same_bits, trained

WORLD = 2
BATCH = 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# With blocks this small, the first weight is cut into blocks on process 0 but would fit into one on process 1.
SMALL_BLOCK = 16

SCENARIOS: dict[str, Callable[[], None]] = {}


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


def each_case(function: Callable[[Case], None]) -> Callable[[Case], None]:
    for name, case in CASES.items():
        SCENARIOS[f"{function.__name__}[{name}]"] = partial(function, case)
    return function


# ----------------------------------------------------------------------------------------------------- what is trained


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Rows are 7, of which the processes get 4 and 3, and 1, of which process 1 gets none."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 2)
    return net


def batches(dtype: torch.dtype, first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64).to(dtype)
        yield x, x.square().sum(1, keepdim=True)


def train(net: nn.Module, optimizer: LearnedOptimizer | ZeroRedundancyOptimizer, steps: int, first: int = 0) -> None:
    """On whole batches: what the processes together must equal."""
    for x, y in batches(next(net.parameters()).dtype, first, steps):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def train_on_my_half(
    net: nn.Module, optimizer: LearnedOptimizer, steps: int, first: int = 0, average_loss: bool = False
) -> None:
    mine = slice(dist.get_rank(), None, WORLD)
    for x, y in batches(next(net.parameters()).dtype, first, steps):
        optimizer.zero_grad()
        loss = (net(x[mine]) - y[mine]).square().mean()
        loss.backward()
        shown = loss.detach().clone()
        if average_loss:
            dist.all_reduce(shown)
            shown /= WORLD
        optimizer.step(loss=shown)


def build(case: Case, net: nn.Module) -> LearnedOptimizer:
    return case.build([*net.parameters()], lr=0.1, weight_decay=0.1)


def trained_alone(case: Case, dtype: torch.dtype, steps: int) -> tuple[nn.Module, LearnedOptimizer]:
    net = network(dtype)
    optimizer = build(case, net)
    train(net, optimizer, steps)
    return net, optimizer


def sharded(case: Case, dtype: torch.dtype = torch.float32, mesh: DeviceMesh | None = None, seed: int = 0) -> Any:
    net = network(dtype, seed)
    for layer in (net[0], net[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh or line())
    fully_shard(net, mesh=mesh or line())
    return net, build(case, net)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def hybrid(shape: tuple[int, int]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


# --------------------------------------------------------------------------------------------------------- comparisons


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def everything(optimizer: LearnedOptimizer) -> dict[str, Tensor]:
    """Parameters and state by name, whole. Every process must ask."""
    found = {}
    for index, param in enumerate(optimizer.param_groups[0]["params"]):
        found[f"{index}"] = full(param)
        found |= {f"{index}.{name}": full(value) for name, value in sorted(optimizer.state[param].items())}
    return found


def close(actual: LearnedOptimizer, expected: LearnedOptimizer, tolerance: float) -> None:
    left, right = everything(actual), everything(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        different = f"{name} differs by {(left[name] - value).abs().max() if value.numel() else 0}"
        assert torch.allclose(left[name], value, rtol=tolerance, atol=tolerance), different


def identical(actual: LearnedOptimizer, expected: LearnedOptimizer) -> None:
    left, right = everything(actual), everything(expected)
    assert left.keys() == right.keys()
    different = [name for name in right if not same_bits([left[name]], [right[name]])]
    assert not different, different


def same_on_all_processes(tensors: Sequence[Tensor]) -> None:
    here = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    everywhere = [torch.empty_like(here) for _ in range(WORLD)]
    dist.all_gather(everywhere, here)
    assert all(same_bits([there], [here]) for there in everywhere)


def started_state(optimizer: LearnedOptimizer) -> None:
    """State is spread as its parameter is, or is everywhere the same: what is small, and all of what is in bases."""
    for param in optimizer.param_groups[0]["params"]:
        has_bases = AGE in optimizer.state[param]
        for value in optimizer.state[param].values():
            if isinstance(value, DTensor):
                lead = value.dim() - param.dim()
                assert value.shape[lead:] == param.shape
                assert value.to_local().shape[lead:] == param.to_local().shape
                assert value.device_mesh == param.device_mesh
            else:
                assert has_bases or value.dim() <= 1
                same_on_all_processes([value])


# ------------------------------------------------------------------------------------------------------------ training


@each_case
def ddp_equals_one_process(case: Case) -> None:
    _, expected = trained_alone(case, torch.float64, 5)
    net = DistributedDataParallel(network(torch.float64))
    optimizer = build(case, net)
    train_on_my_half(net, optimizer, 5, average_loss=True)
    close(optimizer, expected, TOLERANCE[torch.float64])
    same_on_all_processes([*everything(optimizer).values()])


@each_case
def fsdp2_equals_one_process(case: Case) -> None:
    for dtype, tolerance in TOLERANCE.items():
        _, expected = trained_alone(case, dtype, 5)
        net, optimizer = sharded(case, dtype)
        train_on_my_half(net, optimizer, 5)
        close(optimizer, expected, tolerance)
        started_state(optimizer)
        for param in (net[0].weight, net[0].bias):
            state = optimizer.state[param]
            assert AGE in state or any(isinstance(value, DTensor) for value in state.values())


@each_case
def fsdp2_in_blocks_equals_one_process(case: Case) -> None:
    block, blocks.BLOCK = blocks.BLOCK, SMALL_BLOCK
    try:
        _, expected = trained_alone(case, torch.float64, 5)
        net, optimizer = sharded(case, torch.float64)
        train_on_my_half(net, optimizer, 5)
    finally:
        blocks.BLOCK = block
    close(optimizer, expected, TOLERANCE[torch.float64])


@each_case
def fsdp2_with_state_in_eight_bits_equals_one_process(case: Case) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "state_dtype": torch.int8}
    alone, (net, full_precision) = network(torch.float32), sharded(case)
    expected, optimizer = (case.build([*model.parameters()], **options) for model in (alone, net))
    train(alone, expected, 5)
    train_on_my_half(net, optimizer, 5)
    for param, other in zip(net.parameters(), alone.parameters()):
        # A unit may be kept as the next code where its gradient was summed in another order.
        assert torch.allclose(full(param), other, rtol=1e-2, atol=1e-2)
    started_state(optimizer)
    full_precision.load_state_dict(optimizer.state_dict())
    started_state(full_precision)
    kept = [(name, value.dtype) for state in full_precision.state.values() for name, value in state.items()]
    assert all(dtype == (torch.int64 if name == AGE else torch.float32) for name, dtype in kept)


@each_case
def hybrid_sharding_equals_one_process(case: Case) -> None:
    _, expected = trained_alone(case, torch.float64, 3)
    for shape in ((WORLD, 1), (1, WORLD)):
        net, optimizer = sharded(case, torch.float64, hybrid(shape))
        train_on_my_half(net, optimizer, 3)
        close(optimizer, expected, TOLERANCE[torch.float64])
        if shape == (WORLD, 1):
            same_on_all_processes([param.to_local() for param in net.parameters()])


@each_case
def fsdp2_over_tensor_parallelism_equals_one_process(case: Case) -> None:
    _, expected = trained_alone(case, torch.float64, 3)
    for shape in ((WORLD, 1), (1, WORLD)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        net = network(torch.float64)
        parallelize_module(net[0], mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))  # type: ignore[index]
        fully_shard(net[0], mesh=mesh["data"])  # type: ignore[index]
        optimizer = build(case, net)
        # The last layer is left plain, so all processes see whole batches, and as one group the same loss.
        train(net, optimizer, 3)
        close(optimizer, expected, TOLERANCE[torch.float64])


@scenario
def parameters_may_be_replaced_before_the_first_step() -> None:
    """Accelerate builds the optimizer first, then shards the model and swaps the tensors of the groups."""
    _, expected = trained_alone(CASES["adam-lstm"], torch.float64, 3)
    net = network(torch.float64)
    optimizer = build(CASES["adam-lstm"], net)
    fully_shard(net, mesh=line())
    optimizer.param_groups[0]["params"] = [*net.parameters()]
    train_on_my_half(net, optimizer, 3)
    close(optimizer, expected, TOLERANCE[torch.float64])


def spread_parameter(value: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(value, mesh, [placement], src_data_rank=None))


@each_case
def every_placement_equals_one_process(case: Case) -> None:
    """Shards along any dimension, replicas, complex numbers, a tensor of no elements, gradients in partial sums."""
    mesh, generator = line(), torch.Generator().manual_seed(0)
    shapes: list[tuple[tuple[int, ...], Placement, torch.dtype]] = [
        ((3, 5), Shard(1), torch.float64),
        ((3, 1), Shard(1), torch.float64),
        ((2, 3, 4), Shard(2), torch.float64),
        ((4,), Replicate(), torch.float64),
        ((), Replicate(), torch.float64),
        ((3, 3), Shard(0), torch.complex128),
        ((0, 3), Shard(0), torch.float64),
    ]
    values = [torch.randn(shape, dtype=dtype, generator=generator) for shape, _, dtype in shapes]
    plain = [nn.Parameter(value.clone()) for value in values]
    params = [spread_parameter(value, mesh, placement) for value, (_, placement, _) in zip(values, shapes)]
    expected, optimizer = (case.build(tensors, lr=0.1, weight_decay=0.1) for tensors in (plain, params))
    for step in range(3):
        for one, many, (_, placement, _) in zip(plain, params, shapes):
            one.grad = torch.randn(one.shape, dtype=one.dtype, generator=generator)
            if isinstance(placement, Replicate):
                part = one.grad * (0.25 if dist.get_rank() == 0 else 0.75)
                many.grad = DTensor.from_local(part, mesh, [Partial()])
            else:
                many.grad = distribute_tensor(one.grad, mesh, [placement], src_data_rank=None)
        expected.step(loss=1.5 + step)
        optimizer.step(loss=1.0 + step + dist.get_rank())
    close(optimizer, expected, TOLERANCE[torch.float64])


@each_case
def masked_elements_of_sharded_tensors_stay(case: Case) -> None:
    """Those of matrices in bases too, which every process moves whole."""
    mesh, generator = line(), torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((5, 6), (7,), (3, 2, 2))]
    plain = [nn.Parameter(value.clone()) for value in values]
    params = [spread_parameter(value, mesh, Shard(0)) for value in values]
    masks = [torch.rand(value.shape, generator=generator) < 0.5 for value in values]
    expected, optimizer = (
        case.build(tensors, weight_decay=0.01, mask_zero_gradients=True) for tensors in (plain, params)
    )
    for _ in range(3):
        for one, many, mask in zip(plain, params, masks):
            one.grad = torch.randn(one.shape, generator=generator) * ~mask
            many.grad = distribute_tensor(one.grad, mesh, [Shard(0)], src_data_rank=None)
        expected.step(loss=1.5)
        optimizer.step(loss=1.5)
    for param, value, mask in zip(params, values, masks):
        assert same_bits([full(param)[mask]], [value[mask]])
    close(optimizer, expected, TOLERANCE[torch.float32])


@scenario
def no_element_of_lr_zero_moves() -> None:
    for case in CASES.values():
        net, optimizer = sharded(case)
        optimizer.param_groups[0]["lr"] = 0.0
        before = [full(param) for param in net.parameters()]
        train_on_my_half(net, optimizer, 1)
        assert same_bits([full(param) for param in net.parameters()], before)


@scenario
def one_process_with_a_bad_gradient_makes_all_skip() -> None:
    for case in CASES.values():
        net, optimizer = sharded(case)
        optimizer.param_groups[0]["nonfinite"] = "skip"
        train_on_my_half(net, optimizer, 1)
        before = everything(optimizer)
        net[0].weight.grad.to_local()[0, 0] = torch.nan if dist.get_rank() == 1 else 0.0
        optimizer.step(loss=1.0)
        after = everything(optimizer)
        assert same_bits([*after.values()], [*before.values()])
        net[0].weight.grad.to_local().zero_()
        optimizer.step(loss=1.0)
        assert not same_bits([*everything(optimizer).values()], [*before.values()])


@scenario
def one_process_with_a_bad_gradient_makes_all_raise() -> None:
    net, optimizer = sharded(CASES["trace"])
    optimizer.param_groups[0]["nonfinite"] = "raise"
    train_on_my_half(net, optimizer, 1)
    net[0].bias.grad.to_local()[0] = torch.inf if dist.get_rank() == 1 else 0.0
    with pytest.raises(RuntimeError, match="not finite: the gradient of parameter 1"):
        optimizer.step()


@scenario
def processes_that_share_tensors_agree_on_the_backend() -> None:
    """Each chooses by what is compiled on its own disk, and not all backends make the same collective calls."""
    here = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        for backend in (NativeBackend, BlockedBackend) if here == 1 else (NativeBackend,):
            patch.setattr(backend, "unprepared", lambda self: "it is not compiled here")
        _, expected = trained_alone(CASES["adam-lstm"], torch.float32, 2)
        net, optimizer = sharded(CASES["adam-lstm"])
        assert optimizer.backend == ("blocked", "reference")[here]
        train_on_my_half(net, optimizer, 2)
    assert optimizer.backend == "reference"
    close(optimizer, expected, TOLERANCE[torch.float32])


@scenario
def a_learned_initialization_is_sharded() -> None:
    shapes = tuple(tuple(param.shape) for param in network().parameters())
    rule = MetaLSTMRule(MetaLSTMConfig(hidden_size=4, learner_shapes=shapes))
    with torch.no_grad():
        assert rule.c0 is not None
        rule.c0.copy_(torch.arange(rule.c0.numel()))
    net, _ = sharded(CASES["meta-lstm"])
    optimizer = MetaLSTMOptimizer(net.parameters(), rule)
    optimizer.load_initialization()
    assert rule.initial_params is not None
    for param, value in zip(net.parameters(), rule.initial_params):
        assert torch.equal(full(param), value)


@scenario
def averages_of_sharded_tensors_are_those_of_whole_ones() -> None:
    """Also of matrices in bases, whose state every process has whole; and parameters come back bit for bit."""
    for rule in (KINDS["chain"].rule(), trained(ChainRule(), scale=0.1)):
        mesh, generator = line(), torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in ((5, 6), (7,), (3, 2, 2), (1, 4))]
        plain = [nn.Parameter(value.clone()) for value in values]
        params = [spread_parameter(value, mesh, Shard(0)) for value in values]
        expected, optimizer = LearnedOptimizer(plain, rule), LearnedOptimizer(params, rule)
        for _ in range(3):
            for one, many in zip(plain, params):
                one.grad = torch.randn(one.shape, generator=generator)
                many.grad = distribute_tensor(one.grad, mesh, [Shard(0)], src_data_rank=None)
            expected.step()
            optimizer.step()
        before = everything(optimizer)
        ends = [param.detach().clone() for param in plain]
        with expected.averaged_parameters(), optimizer.averaged_parameters():
            assert not any(torch.equal(one, end) for one, end in zip(plain, ends))
            for one, many in zip(plain, params):
                torch.testing.assert_close(full(many), one.detach(), rtol=1e-5, atol=1e-5)
        assert same_bits([*everything(optimizer).values()], [*before.values()])


# ----------------------------------------------------------------------------------------------------- other wrappers


KINDS_THAT_COUNT = ("schedule-free", "eigenbasis", "chain")
"""Whose steps depend on how many tensors are trained together."""


@scenario
def zero_redundancy_equals_one_optimizer() -> None:
    """Each process steps for some of the tensors; what it cannot count it is told."""
    rules: list[Any] = [
        *(KINDS[name].rule() for name in KINDS_THAT_COUNT),
        CASES["adam-lstm"].rule(),
        "default",
        "light",
    ]
    for rule in rules:
        alone, net = network(torch.float64), network(torch.float64)
        expected = LearnedOptimizer(alone.parameters(), rule)
        optimizer = ZeroRedundancyOptimizer(net.parameters(), LearnedOptimizer, rule=rule, together=4)
        assert 0 < sum(len(group["params"]) for group in optimizer.optim.param_groups) < 4
        train(alone, expected, 30)
        train(net, optimizer, 30)
        for param, value in zip(net.parameters(), alone.parameters()):
            # Matrices that are stacked with others elsewhere are rounded in another way.
            torch.testing.assert_close(param, value, rtol=1e-7, atol=1e-7)


@scenario
def without_being_told_zero_redundancy_differs() -> None:
    """Which is what the number is for."""
    alone, net = network(torch.float64), network(torch.float64)
    expected = LearnedOptimizer(alone.parameters(), KINDS["chain"].rule())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), LearnedOptimizer, rule=KINDS["chain"].rule())
    train(alone, expected, 3)
    train(net, optimizer, 3)
    assert any(not torch.allclose(*pair, rtol=1e-4) for pair in zip(net.parameters(), alone.parameters()))


@scenario
def flat_parameters_are_refused_for_rules_that_look_at_whole_tensors() -> None:
    for orig in (True, False):
        net = FullyShardedDataParallel(network(), use_orig_params=orig, device_id=torch.device("cpu"))
        for rule in (None, "light", *(KINDS[name].rule() for name in ("adam-lstm", "separate-lstm", "chain"))):
            with pytest.raises(ValueError, match=r"FSDP1.* looks at whole tensors.*FSDP2"):
                LearnedOptimizer(net.parameters(), rule)
        optimizer = LearnedOptimizer([torch.ones(2, requires_grad=True)], "light")
        with pytest.raises(ValueError, match="FSDP2"):
            optimizer.add_param_group({"params": net.parameters()})
        assert len(optimizer.param_groups) == 1


@scenario
def flat_parameters_are_right_for_rules_of_single_coordinates() -> None:
    rule = CASES["lstm"].rule()
    alone = network()
    expected = LearnedOptimizer(alone.parameters(), rule)
    train(alone, expected, 3)
    net = FullyShardedDataParallel(network(), use_orig_params=False, device_id=torch.device("cpu"))
    train_on_my_half(net, LearnedOptimizer(net.parameters(), rule), 3)
    with FullyShardedDataParallel.summon_full_params(net):
        found = torch.cat([param.flatten() for param in net.parameters()])
        wanted = torch.cat([param.flatten() for param in alone.parameters()])
        torch.testing.assert_close(found[: wanted.numel()], wanted, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- checkpoints


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that both processes know."""
    with tempfile.TemporaryDirectory() as mine:
        names: list[str | None] = [mine]
        dist.broadcast_object_list(names)
        yield Path(str(names[0]))
        dist.barrier()


def state_of(net: nn.Module, optimizer: LearnedOptimizer, options: StateDictOptions) -> dict[str, Any]:
    model, its = get_state_dict(net, optimizer, options=options)
    return {"model": model, "optimizer": its}


def set_state(net: nn.Module, optimizer: LearnedOptimizer, saved: dict[str, Any], options: StateDictOptions) -> None:
    set_state_dict(
        net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )


@each_case
def a_checkpoint_of_two_processes_loads_in_one_and_back(case: Case) -> None:
    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        with shared_folder() as folder:
            net, optimizer = sharded(case)
            train_on_my_half(net, optimizer, 2)
            save(state_of(net, optimizer, options), checkpoint_id=folder / "two")

            # Each process for itself, as one process does, and from other parameters than those saved.
            alone = network(seed=1)
            unsharded = build(case, alone)
            saved = state_of(alone, unsharded, options)
            load(saved, checkpoint_id=folder / "two", no_dist=True)
            set_state(alone, unsharded, saved, options)
            identical(unsharded, optimizer)
            assert unsharded.param_groups[0]["lr"] == 0.1

            train(alone, unsharded, 1, first=2)
            if dist.get_rank() == 0:
                save(state_of(alone, unsharded, options), checkpoint_id=folder / "one", no_dist=True)
            dist.barrier()
            net, optimizer = sharded(case, seed=2)
            saved = state_of(net, optimizer, options)
            load(saved, checkpoint_id=folder / "one")
            set_state(net, optimizer, saved, options)
            identical(optimizer, unsharded)
            started_state(optimizer)


@each_case
def a_full_state_dict_loads_everywhere(case: Case) -> None:
    # Not flattened as well: torch cannot load that, into whichever optimizer.
    net, optimizer = sharded(case)
    train_on_my_half(net, optimizer, 2)
    saved = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    for broadcast in (False, True):
        other_net, other = sharded(case)
        other_net.load_state_dict(net.state_dict())
        given = saved if not broadcast or dist.get_rank() == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_optimizer_state_dict(other_net, other, given, options=options)
        identical(other, optimizer)
        started_state(other)
    alone = network()
    alone.load_state_dict({name: full(value) for name, value in net.state_dict().items()})
    unsharded = build(case, alone)
    set_optimizer_state_dict(alone, unsharded, saved)
    identical(unsharded, optimizer)


@each_case
def plain_state_dicts_are_spread_and_gathered_as_parameters_are(case: Case) -> None:
    net, optimizer = sharded(case)
    train_on_my_half(net, optimizer, 2)
    alone = network()
    alone.load_state_dict({name: full(value) for name, value in net.state_dict().items()})
    unsharded = build(case, alone)
    unsharded.load_state_dict(optimizer.state_dict())
    identical(unsharded, optimizer)
    replicas, other = sharded(case, mesh=hybrid((WORLD, 1)), seed=3)
    with torch.no_grad():
        for param, value in zip(replicas.parameters(), alone.parameters()):
            param.copy_(distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None))
    for state_dict in (unsharded.state_dict(), optimizer.state_dict()):
        other.load_state_dict(state_dict)
        identical(other, unsharded)
        started_state(other)


@each_case
def resumed_training_is_the_same_to_the_last_bit(case: Case) -> None:
    net, optimizer = sharded(case)
    train_on_my_half(net, optimizer, 2)
    other_net, other = sharded(case, seed=1)
    other_net.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for model, its in ((net, optimizer), (other_net, other)):
        train_on_my_half(model, its, 2, first=2)
    identical(other, optimizer)


@scenario
def large_and_small_tensors_make_the_same_calls_on_every_process() -> None:
    """Without a hang, for sizes around a block on one process and not on the other."""
    mesh, generator = line(), torch.Generator().manual_seed(0)
    block, blocks.BLOCK = blocks.BLOCK, SMALL_BLOCK
    rows = [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 0, 64]
    try:
        plain = [nn.Parameter(torch.randn(n, 1, generator=generator, dtype=torch.float64)) for n in rows]
        params = [spread_parameter(param.detach().clone(), mesh, Shard(0)) for param in plain]
        expected, optimizer = LearnedOptimizer(plain, TraceRule()), LearnedOptimizer(params, TraceRule())
        for _ in range(2):
            for one, many in zip(plain, params):
                one.grad = torch.randn(one.shape, dtype=one.dtype, generator=generator)
                many.grad = distribute_tensor(one.grad, mesh, [Shard(0)], src_data_rank=None)
            expected.step()
            optimizer.step()
    finally:
        blocks.BLOCK = block
    close(optimizer, expected, TOLERANCE[torch.float64])


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    report: dict[str, str] = {}
    for name, run in SCENARIOS.items():
        try:
            run()
            report[name] = "passed"
        except Exception:
            report[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
