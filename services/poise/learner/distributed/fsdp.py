"""Sharding of parameters over ranks with FSDP2, and conversion between shards and full tensors.

With one process, parameters are not sharded and the conversions return their argument. Every rank must make the same
calls.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from poise.learner.distributed.process_group import World


def shard(module: torch.nn.Module, layers: Iterable[torch.nn.Module], world: World, *, keep_head: bool = True) -> None:
    """Shard a module's parameters in place. Each layer is one FSDP unit, the rest of the module another.

    With `keep_head` the rest stays gathered after the forward pass, because the backward pass needs the head first.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))  # the default would use a GPU even with `device: cpu`
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep_head)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # the loss is already divided by the denominator of all ranks
            part.set_force_sum_reduction_for_comms(True)  # gloo supports no other


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter or moment, gathered from its shards."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_rank_zero(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return what a rank keeps of a full tensor: rank 0 a copy in host memory, other ranks an empty tensor.

    All full tensors together do not fit on a device. Without sharding, return the tensor itself.
    """
    if not world.is_sharded:
        return tensor
    return tensor.cpu() if world.rank == 0 else tensor.new_empty(0)


def shard_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of rank 0's full tensor, laid out as `parameter`; a copy."""
    tensor = tensor.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a parameter or gradient; not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
