"""What each rank holds of a model, and how its gradients come together: the strategies of `DistributedSpec`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainkit.distribution import World
from trainkit.reduction import Reducer, TreeReducer, WrapperReducer
from trainkit.sharding import Shares, collect_on_main, share_parameters, spread_weights
from trainkit.specs import DistributedSpec


@dataclass(frozen=True)
class Replica:
    """A model as the loop uses it: `forward` is the wrapped module, `module` the plain one."""

    forward: nn.Module
    module: nn.Module
    reducer: Reducer
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within this context backward passes leave gradients local."""
    shares: Shares | None = None
    """Which rank updates which parameter; None = all ranks update all of them."""
    after_update: Callable[[], None] = lambda: None
    """Makes the weights equal on all ranks again."""
    collect: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """From what this rank holds of the optimizer's tensors to all of them, on the first rank; all ranks call it."""


def replicate(model: nn.Module, world: World, distributed: DistributedSpec | None = None) -> Replica:
    """Give the model of the first rank to all, and decide how gradients are added."""
    distributed = distributed or DistributedSpec()
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    if world.device.type == "cpu" or distributed.reduction == "tree":
        replica = Replica(model, model, TreeReducer(model.parameters(), world))
    elif world.size == 1:
        replica = Replica(model, model, WrapperReducer(nullcontext))
    else:
        wrapped = _data_parallel(model, world)
        replica = Replica(wrapped, model, WrapperReducer(wrapped.no_sync), wrapped.no_sync)
    if distributed.strategy == "zero1" and world.size > 1:
        replica = _with_shared_optimizer(replica, world)
    return replica


def _with_shared_optimizer(replica: Replica, world: World) -> Replica:
    shares = share_parameters(replica.module, world)
    return replace(
        replica,
        shares=shares,
        after_update=partial(spread_weights, replica.module, shares, world),
        collect=partial(collect_on_main, world=world),
    )


def _data_parallel(model: nn.Module, world: World) -> DistributedDataParallel:
    """DDP, which sends gradients while the backward pass of the last micro-batch still computes others."""
    with warnings.catch_warnings():
        # torch 2.15 renames the option; the old name is the one that all supported versions know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    # DDP divides by the number of ranks. A task's value is already divided by the step's global denominators, so that
    # gradients must be summed. (A lambda, because DDP compares annotations as objects and ours are strings.)
    wrapped.register_comm_hook(None, lambda _, bucket: _sum_gradients(bucket))
    return wrapped


def _sum_gradients(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(_first_value)


def _first_value(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]
