"""What each rank holds of a model, and how its gradients come together: the strategies of `DistributedSpec`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from profiling import nvtx
from trainkit.distribution import World
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.fully_sharded import made_whole, shard_fully, unsynchronised, whole_on_main
from trainkit.reduction import LocalReducer, Reducer, TreeReducer, WrapperReducer
from trainkit.sharding import Shares, collect_on_main, share_parameters, spread_weights
from trainkit.specs import DistributedSpec, OptimizerSpec, TrainingSpec
from trainkit.tree import is_power_of_two


@dataclass(frozen=True)
class Replica:
    """A model as the loop uses it: `forward` is the wrapped module, `module` the plain one."""

    forward: nn.Module
    module: nn.Module
    reducer: Reducer
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around a trial whose gradient is thrown away (`zero_grad`): ranks need not talk about it."""
    shares: Shares | None = None
    """Which rank updates which parameter; None = all ranks update all of them."""
    after_update: Callable[[], None] = lambda: None
    """Makes the weights equal on all ranks again."""
    collect: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """From what this rank holds of the optimizer's tensors to all of them, on the first rank; all ranks call it."""
    collect_weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """The same for weights and their averages."""
    by_itself: Callable[[], AbstractContextManager[None]] = nullcontext
    """Inside, each rank can use `module` without the others; all ranks enter and leave it together."""


def replicate(model: nn.Module, world: World, distributed: DistributedSpec | None = None) -> Replica:
    """Give the model of the first rank to all, and decide how gradients are added."""
    distributed = distributed or DistributedSpec()
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    if distributed.strategy == "fsdp" and world.size > 1:
        return _fully_sharded(model, world)
    if world.device.type == "cpu" or distributed.reduction == "tree":
        replica = Replica(model, model, TreeReducer(model.parameters(), world))
    elif world.size == 1:
        replica = Replica(model, model, LocalReducer(model))
    else:
        replica = _data_parallel(model, world)
    if distributed.strategy == "zero1" and world.size > 1:
        replica = _with_shared_optimizer(replica, world)
    return replica


def _with_shared_optimizer(replica: Replica, world: World) -> Replica:
    shares = share_parameters(replica.module, world)
    return replace(
        replica,
        shares=shares,
        after_update=partial(spread_weights, replica.module, shares),
        collect=partial(collect_on_main, world=world),
    )


def _fully_sharded(model: nn.Module, world: World) -> Replica:
    units = shard_fully(model, world)
    collect = partial(whole_on_main, world=world)
    return Replica(
        forward=model,
        module=model,
        # FSDP hides gradients that it has not added yet, where no `zero_grad` finds them: a trial adds them.
        reducer=WrapperReducer(model, partial(unsynchronised, model)),
        collect=collect,
        collect_weights=collect,
        by_itself=partial(made_whole, units),
    )


def _data_parallel(model: nn.Module, world: World) -> Replica:
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
    return Replica(wrapped, model, WrapperReducer(model, wrapped.no_sync), wrapped.no_sync)


def _sum_gradients(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
    with nvtx.range("reduce"):  # on its way; who waits for it is DDP, at the end of the backward pass
        work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(_first_value)


def _first_value(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


def check_distribution(
    distributed: DistributedSpec, training: TrainingSpec, optimizer: OptimizerSpec, samples: int, ranks: int
) -> None:
    """Refuse what could not keep its promise on so many ranks. `samples`: of one step, over all of them."""
    problem = ""
    if distributed.reduction == "tree":
        problem = _problem_of_tree(distributed, training, samples, ranks)
    elif distributed.strategy == "fsdp" and ranks > 1:
        problem = _problem_of_fsdp(optimizer, samples, ranks)
    if problem:
        raise UserError(problem, EXIT_USAGE)


def bits_of_tree(distributed: DistributedSpec, training: TrainingSpec) -> dict[str, int]:
    """The settings that the bits of a run in tree mode depend on, and that may otherwise change when it resumes."""
    if distributed.reduction != "tree":
        return {}
    return {"device_batch_size": training.device_batch_size, "threads": training.threads}


def check_bits_of_tree(before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Refuse to go on with other bits than the run began with, where both promise the same ones."""
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise UserError(
                f'the checkpoint was trained with distributed.reduction = "tree" and training.{name} = {before[name]}, '
                f'which decides about bits; restore it (it is {now[name]} now), or go on with reduction = "sum"',
                EXIT_USAGE,
            )


def _problem_of_tree(distributed: DistributedSpec, training: TrainingSpec, samples: int, ranks: int) -> str:
    leaf = training.device_batch_size
    leaves = samples // leaf
    tree = 'distributed.reduction = "tree"'
    if distributed.strategy == "fsdp":
        return f'{tree} does not go with distributed.strategy = "fsdp", which adds gradients itself: use zero1'
    if samples % leaf:
        return (
            f"{tree} needs micro-batches of equal size, but a step has {samples} samples and "
            f"training.device_batch_size = {leaf}: choose a divisor of {samples}"
        )
    if not is_power_of_two(ranks):
        return f"{tree} needs 1, 2, 4, 8, … ranks, not {ranks}: change the number of processes"
    if leaves % ranks:
        return (
            f"{tree} needs equally many micro-batches on every rank, but a step has {leaves} (of "
            f"training.device_batch_size = {leaf} samples) for {ranks} ranks: choose a smaller "
            "training.device_batch_size, or fewer processes"
        )
    if not training.threads:
        return (
            f"{tree} needs a fixed number of CPU threads, because it decides about bits: set training.threads, say to 1"
        )
    return ""


def _problem_of_fsdp(optimizer: OptimizerSpec, samples: int, ranks: int) -> str:
    fsdp = 'distributed.strategy = "fsdp"'
    if optimizer.kind != "adamw":
        return f'{fsdp} cuts matrices, which optimizer.kind = "{optimizer.kind}" needs whole: use zero1, or adamw'
    if samples % ranks:
        return (
            f"{fsdp} needs equally many samples on every rank, but a step has {samples} for {ranks} ranks: change "
            "training.total_batch_size or the number of processes"
        )
    return ""
