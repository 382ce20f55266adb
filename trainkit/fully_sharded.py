"""FSDP2: every rank holds a share of each weight, gradient and optimizer tensor (`torch.distributed.fsdp.fully_shard`).

Each block of the model (each entry of an `nn.ModuleList`) is made whole where it computes, and dropped again. Shares
are `DTensor`s; outside of this module they look like tensors. What leaves the ranks (checkpoints) is whole, and what
comes in is cut, so that no file knows how many ranks there were.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trainkit.distribution import World


def shard_fully(model: nn.Module, world: World) -> list[Any]:
    """Shard `model` in place; returns the modules that are made whole one by one (FSDP modules), the model last."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    units: list[Any] = []
    for unit in (*(block for blocks in reversed(lists) for block in blocks), model):
        fully_shard(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        # A sum, not FSDP's mean (see `trainkit.task`); gloo knows no other way to ask for one.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        units.append(unit)
    return units


@contextmanager
def unsynchronised(model: Any) -> Generator[None]:
    """Backward passes inside leave gradients on the rank that computed them."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def made_whole(units: list[Any]) -> Generator[None]:
    """All weights are whole inside: each rank can use the model by itself. Takes the memory of the weights."""
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor from the shares of all ranks, which all must call it; any other tensor is itself."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def whole_on_main(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors made whole, one at a time, on the CPU of the first rank; nothing on the others. All must call it."""
    collected: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world.is_main:
            collected[name] = full.cpu()
    return collected


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """`tensor`, which all ranks hold whole, as `example` is held, on its device."""
    mesh = getattr(example, "device_mesh", None)
    if mesh is None:
        return tensor.to(example.device)
    from torch.distributed.tensor import distribute_tensor

    placements: Any = example.placements  # pyright: ignore[reportAttributeAccessIssue]
    return distribute_tensor(tensor.to(example.device), mesh, placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's share, in the same memory; any other tensor is itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor
