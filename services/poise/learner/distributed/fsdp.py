"""Parameters that lie in parts over processes: how they are taken apart, and how they come together.

Alone, a parameter is whole and all of this does nothing. With several processes all of them must make the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from poise.learner.distributed.process_group import World


def shard(module: torch.nn.Module, layers: Iterable[torch.nn.Module], world: World, *, keep_head: bool = True) -> None:
    """Take apart, in place, the parameters of a module that is called as one, those of each layer by themselves.

    `keep_head` holds what is in no layer whole after the forward pass: the gradient needs the head's weights at once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))  # else a GPU that is there is taken for `device: cpu` too
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep_head)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # losses are divided by what all processes have together
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a parameter, or of a moment of its shape, wherever its parts lie."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return what this process is to keep of what `whole` gave, while it asks for more.

    Where parameters lie in parts, their device has no room for all of them at once: the first process keeps them
    outside it, and the others none.
    """
    if not world.is_sharded:
        return tensor
    return tensor.cpu() if world.rank == 0 else tensor.new_empty(0)


def part_of(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of what the first process has whole, laid out as `parameter`; a copy."""
    tensor = tensor.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter or gradient that lies here; not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
