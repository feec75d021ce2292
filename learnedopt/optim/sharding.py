"""Parameters spread over processes: the DTensors of FSDP2 (``fully_shard``) and of tensor parallelism.

A rule works on the coordinates that are here. What it asks about whole tensors is summed over all shards, so that
the processes together compute what one of them would that held everything. Each must take part in every sum, in the
same order, however little of a tensor it holds: nothing may be decided by the size of the shard that is here.

Plain tensors pass through these functions as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # its import takes seconds, and whoever has a DTensor has done it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Shard

Spread = tuple["DeviceMesh", tuple[int, ...]]
"""The processes that hold a tensor, and the dimensions of their mesh that hold different coordinates of it."""


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "device_mesh")


def spread(tensor: Tensor) -> Spread | None:
    """How a tensor is spread, ``None`` for a plain one. Those spread alike can be worked on together."""
    if not is_distributed(tensor):
        return None
    sharded = (dim for dim, placement in enumerate(tensor.placements) if _is_shard(placement))
    return tensor.device_mesh, tuple(sharded)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape: not fake, as under ``FakeTensorMode``, and not on the device ``meta``."""
    return not tensor.is_meta and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    return hasattr(local(tensor), "fake_mode")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, as a plain one. Every process of its mesh must ask."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def keep_whole(tensor: Tensor, values: Tensor) -> None:
    """Write values of the whole tensor, which every process has, into what this one holds of it."""
    if is_distributed(tensor):
        local(tensor).copy_(local(copy_beside(tensor, values, tensor.dtype)))


def align(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient with the placements of its parameter; tensor parallelism may leave it as partial sums."""
    if is_distributed(grad) and is_distributed(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def total_over(layout: Spread) -> Callable[[Tensor], Tensor]:
    """A function that adds up the values of all processes which hold different coordinates."""
    mesh, sharded = layout

    def total(values: Tensor) -> Tensor:
        for dim in sharded:
            dist.all_reduce(values, group=mesh.get_group(dim))
        return values

    return total


def mean_over(mesh: DeviceMesh, value: Tensor) -> Tensor:
    """The mean of the processes' values."""
    mean = value / mesh.size()
    for dim in range(mesh.ndim):
        dist.all_reduce(mean, group=mesh.get_group(dim))
    return mean


def most_over(mesh: DeviceMesh, value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    most = torch.tensor(value, device=device)
    for dim in range(mesh.ndim):
        dist.all_reduce(most, dist.ReduceOp.MAX, mesh.get_group(dim))
    return int(most)


def anywhere(flags: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Which flags are set in any of the processes that the tensors are spread over."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_distributed(tensor))
    if not meshes:
        return flags
    found = flags.to(torch.uint8)
    for mesh in meshes:
        for dim in range(mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MAX, mesh.get_group(dim))
    return found.bool()


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy elsewhere; it is waited for on the way to the host only, where it could be read before it is there."""
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def zeros_beside(param: Tensor, lead: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros ``(*lead, *param.shape)``, each on the device and in the process of its coordinate."""
    return _assemble(param, torch.zeros(lead + tuple(local(param).shape), dtype=dtype, device=param.device))


def copy_beside(param: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of values ``(*lead, *param.shape)``, each on the device and in the process of its coordinate.

    They may be plain, the same in every process, or spread in any way, over any mesh.
    """
    if is_distributed(param):
        placements = _shifted(param, values.dim() - param.dim())
        if not is_distributed(values) or (values.device_mesh, values.placements) != (param.device_mesh, placements):
            from torch.distributed.tensor import distribute_tensor

            # Every process has all values: none has to be sent any.
            values = distribute_tensor(whole(values), param.device_mesh, placements, src_data_rank=None)
        here = local(values)
    else:
        here = whole(values)
    return _assemble(param, here.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format))


def _assemble(param: Tensor, here: Tensor) -> Tensor:
    """Values ``(*lead, *param.shape)`` spread as the parameter is, from what is here of them."""
    if not is_distributed(param):
        return here
    from torch.distributed.tensor import DTensor

    lead = here.shape[: here.dim() - param.dim()]
    shape = lead + param.shape
    stride = torch.empty(shape, device="meta").stride()
    # Both are given because they cannot be told from shards of unequal sizes.
    return DTensor.from_local(here, param.device_mesh, _shifted(param, len(lead)), shape=shape, stride=stride)


def _shifted(param: DTensor, by: int) -> tuple[Placement, ...]:
    """The placements of a parameter for a tensor that has ``by`` more dimensions before the parameter's."""
    placements = []
    for placement in param.placements:
        if _is_shard(placement):
            # Sharding in strides, which FSDP2 over tensor parallelism uses, has this second setting.
            strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
            placement = type(placement)(placement.dim + by, **strided)
        placements.append(placement)
    return tuple(placements)


def _is_shard(placement: Placement) -> TypeGuard[Shard]:
    return hasattr(placement, "dim")
