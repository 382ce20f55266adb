"""ZeRO-1: each parameter's optimizer state lives on one rank, whole (arXiv:1910.02054).

The rank that owns a parameter updates it and gives the new weights to the others. Whole parameters, not slices of them:
an optimizer then computes for each parameter exactly what it computes without sharing, Muon's products of matrices
included, and a checkpoint by parameter name knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.distribution import World, gather_over_ranks


@dataclass(frozen=True)
class Shares:
    by_rank: tuple[tuple[str, ...], ...]
    """Names of the parameters that each rank owns, in the model's order."""
    rank: int

    @property
    def own(self) -> frozenset[str]:
        return frozenset(self.by_rank[self.rank])


def share_parameters(model: nn.Module, world: World) -> Shares:
    """Balanced by size, the largest first: a function of the model and the number of ranks alone."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    loads = [0] * world.size
    owner: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return Shares(tuple(tuple(n for n in sizes if owner[n] == rank) for rank in range(world.size)), world.rank)


@torch.no_grad()
def spread_weights(model: nn.Module, shares: Shares) -> None:
    """Every owner gives its weights to the others: one broadcast a rank, all under way at once."""
    parameters = dict(model.named_parameters())
    parts = [[parameters[name].detach() for name in names] for names in shares.by_rank]
    flats = [torch.cat([p.flatten() for p in part]) if part else None for part in parts]
    works = [dist.broadcast(flat, src=r, async_op=True) for r, flat in enumerate(flats) if flat is not None]
    for work in works:
        assert work is not None
        work.wait()
    for rank, (part, flat) in enumerate(zip(parts, flats, strict=True)):
        if flat is not None and rank != shares.rank:
            pieces = flat.split([p.numel() for p in part])
            torch._foreach_copy_(part, [x.view_as(p) for x, p in zip(pieces, part, strict=True)])  # pyright: ignore[reportPrivateImportUsage]


def collect_on_main(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors of all ranks by name, on the first one; the others get only their own. All must call it."""
    if world.size == 1:
        return dict(tensors)
    lists = gather_over_ranks([(name, t.shape, t.dtype) for name, t in tensors.items()], world)
    collected = dict(tensors)
    for rank, described in enumerate(lists):
        if rank == 0:
            continue
        for name, shape, dtype in described:
            if world.is_main:
                collected[name] = _receive(shape, dtype, rank, world)
            elif rank == world.rank:
                dist.send(tensors[name].detach().cpu().contiguous(), 0, group=world.control_group)
    return collected


def _receive(shape: Sequence[int], dtype: torch.dtype, source: int, world: World) -> Tensor:
    tensor = torch.empty(tuple(shape), dtype=dtype)
    dist.recv(tensor, source, group=world.control_group)
    return tensor
