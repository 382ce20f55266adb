"""The ranks of a run: who I am, where I compute, and the few collective operations that the loop needs.

`torchrun` is the engine; without it a run is a world of one, on the same path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from profiling import nvtx
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.specs import TrainingSpec
from trainkit.tree import tree_sum

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Longer than anything that ranks wait for (the first one fetches a checkpoint, samples, makes a tokenizer): how long a
phase may take is for `trainkit.watchdog` to decide, which knows the phase."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    control_group: dist.ProcessGroup | None = None
    """A CPU group for agreements between ranks; None in a world of one."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def open_world(training: TrainingSpec) -> Generator[World]:
    """Join the process group that torchrun describes, or be alone; leave it at the end."""
    device = choose_device(training.device, int(os.environ.get("LOCAL_RANK", "0")))
    configure_process(training)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_COLLECTIVE_TIMEOUT)
    try:
        control_group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
        assert isinstance(control_group, dist.ProcessGroup)
        yield World(dist.get_rank(), size, device, control_group)
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device that `training.device` means for this rank, or one sentence why it cannot be."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    except RuntimeError:
        raise UserError(
            f'training.device = "{name}" is no device; use auto, cpu, cuda, cuda:0 or mps', EXIT_USAGE
        ) from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(
            f'training.device = "{name}" means {device}, on which nothing can be trained here; use auto or cpu, '
            "and no more processes than GPUs",
            EXIT_USAGE,
        )
    return device


def configure_process(training: TrainingSpec) -> None:
    """Process-wide settings of PyTorch, made once, here."""
    if training.threads:
        torch.set_num_threads(training.threads)
    # TF32 on tensor cores: matmuls in "fp32" keep 10 bits of mantissa, about 8 times faster; convolutions likewise.
    torch.set_float32_matmul_precision("highest" if training.deterministic else "high")
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def sum_over_ranks(values: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Each scalar summed over the ranks in float64, in one collective; the names must be the same on all ranks."""
    names = sorted(values)
    if not names:
        return {}
    stacked = torch.stack([values[name].detach().to(widest_float(world.device)) for name in names])
    return dict(zip(names, tree_sum(all_ranks(stacked, world)).unbind(), strict=True))


def all_ranks(values: Tensor, world: World) -> Tensor:
    """Every rank's `values` [...], of one shape on all of them, as [ranks, ...]."""
    if world.size == 1:
        return values[None]
    gathered = values.new_empty(world.size, *values.shape)
    # Flat, because gloo wants to see the ranks' tensors joined along the first dimension.
    with nvtx.range("reduce"):
        dist.all_gather_into_tensor(gathered.view(-1), values.contiguous().view(-1))
    return gathered


def main_first(action: Callable[[], T], world: World) -> T:
    """Run `action` on the first rank and give its result (anything that pickles) to all.

    A `UserError` there ends every rank with its exit code; only the first one says why.
    """
    if world.control_group is None:
        return action()
    outcome: list[Any] = [None, 0]
    error: UserError | None = None
    if world.is_main:
        try:
            outcome[0] = action()
        except UserError as problem:
            error, outcome[1] = problem, problem.exit_code
    dist.broadcast_object_list(outcome, src=0, group=world.control_group)
    if error is not None:
        raise error
    if outcome[1]:
        raise SystemExit(outcome[1])
    return outcome[0]


def gather_over_ranks(value: T, world: World) -> list[T]:
    """Every rank's `value` (anything that pickles) in the order of the ranks, on all of them."""
    if world.control_group is None:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control_group)
    return values


def any_rank(flag: bool, world: World) -> bool:
    """Whether any rank says so: all ranks get the same answer. Over the CPU group, so that no device waits."""
    if world.control_group is None:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, group=world.control_group)
    return bool(votes.item())


class StopVote:
    """Agrees, without making anyone wait, that all ranks stop at the same step: at most one step late.

    Each step's votes travel over the CPU group while the next step computes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def ask(self, wants_to_stop: bool) -> bool:
        """Vote, and learn whether any rank voted for stopping in the call before (alone: in this one)."""
        if self._world.control_group is None:
            return wants_to_stop
        decided = self.close()
        self._votes = torch.tensor([int(wants_to_stop)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._votes, group=self._world.control_group, async_op=True)
        return decided

    def close(self) -> bool:
        """Wait for the votes that are under way, so that none outlives the process group; what they decided."""
        if self._pending is None:
            return False
        self._pending.wait()
        self._pending = None
        return bool(self._votes.item())


def widest_float(device: torch.device) -> torch.dtype:
    """The type for sums over many values: 64 bits wherever the device has them."""
    return torch.float32 if device.type == "mps" else torch.float64
