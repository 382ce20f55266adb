"""From the gradients of micro-batches to the gradient of the step, the same on every rank.

A `Reducer` is told when each micro-batch goes backward, and leaves the step's sum in `.grad`. `TreeReducer` adds in the
order of `trainkit.tree`; `LocalReducer` leaves the adding to autograd, where there is one rank, `WrapperReducer` to a
wrapper of PyTorch (DDP, FSDP), which it only tells which micro-batch is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from profiling import nvtx
from trainkit.distribution import World
from trainkit.tree import finished_pairs, is_power_of_two, odd_part


class Reducer(Protocol):
    def leaf(self, index: int, count: int) -> AbstractContextManager[None]:
        """Micro-batch `index` of this rank's `count` goes forward and backward inside."""
        ...

    def finish(self) -> None:
        """After the last one: `.grad` holds the step's sum over all micro-batches and ranks."""
        ...


@dataclass(frozen=True)
class LocalReducer:
    """One rank, where autograd adds micro-batch after micro-batch."""

    module: nn.Module

    @contextmanager
    def leaf(self, index: int, count: int) -> Generator[None]:
        del count
        if index == 0:
            self.module.zero_grad(set_to_none=True)
        yield
        if index == 0:
            part_gradients(self.module.parameters())

    def finish(self) -> None:
        pass


def part_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every gradient memory of its own.

    Autograd keeps what an operation hands it: parameters that meet through views, as in `a[None] + b[None]`, get
    gradients in one memory, and what is then done in place (adding, clipping) is done to both, twice.
    """
    taken: set[int] = set()
    for parameter in parameters:
        if parameter.grad is not None:
            place = parameter.grad.untyped_storage().data_ptr()
            if place in taken:
                parameter.grad = parameter.grad.clone()
            taken.add(place)


@dataclass(frozen=True)
class WrapperReducer:
    """A wrapper that adds over ranks in every backward pass outside of `no_sync`."""

    module: nn.Module
    no_sync: Callable[[], AbstractContextManager[None]]

    @contextmanager
    def leaf(self, index: int, count: int) -> Generator[None]:
        if index == 0:
            self.module.zero_grad(set_to_none=True)
        if index == count - 1:
            yield
        else:
            with self.no_sync():
                yield

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class _Buffer:
    flat: Tensor
    views: list[Tensor]
    """One for each parameter, in its shape."""


class TreeReducer:
    """Adds gradients over micro-batches and ranks in the order of `trainkit.tree`.

    Every gradient of a subtree lies in one flat buffer; 1 + log2 of this rank's blocks of leaves are needed at a time.
    Over ranks: recursive halving, then doubling (Thakur et al. 2005, "Optimization of collective communication
    operations in MPICH"): as little traffic as any all-reduce, in an order that we know. Where the number of ranks is
    no power of two the backend adds over ranks, in its own order.

    Where a step is one micro-batch on one rank there is nothing to add: its gradients stay where autograd leaves them,
    which spares the buffer, its clearing and its filling.

    A parameter that no micro-batch uses has gradient zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        assert len({(p.dtype, p.device) for p in self._parameters}) == 1, "weights of one type, on one device"
        size = sum(p.numel() for p in self._parameters)
        self._length = -(-size // world.size) * world.size  # ranks exchange equal parts of it
        self._world = world
        self._stack: list[_Buffer] = []
        self._free: list[_Buffer] = []
        self._received = self._empty(self._length // 2 if world.size > 1 else 0)

    def leaf(self, index: int, count: int) -> AbstractContextManager[None]:
        if index == 0:
            # What an earlier step left unfinished, because it failed.
            self._free += self._stack
            self._stack.clear()
        return self._only_leaf() if self._world.size == count == 1 else self._one_of_many(index, odd_part(count))

    @contextmanager
    def _only_leaf(self) -> Generator[None]:
        self._free.clear()  # of steps with more leaves
        for parameter in self._parameters:
            parameter.grad = None
        yield
        part_gradients(self._parameters)
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextmanager
    def _one_of_many(self, index: int, block: int) -> Generator[None]:
        if index % block == 0:
            self._open()
        yield  # autograd adds into the views, which are `.grad`: a block is added from left to right
        if index % block == block - 1:
            for _ in range(finished_pairs(index // block)):
                right = self._stack.pop()
                self._stack[-1].flat.add_(right.flat)
                self._free.append(right)

    def finish(self) -> None:
        if not self._stack:  # an only leaf opens no buffer
            return
        (total,) = self._stack
        if self._world.size > 1:
            with nvtx.range("reduce"):
                add_over_ranks(total.flat, self._received, self._world)
        self._attach(total)
        self._free.append(self._stack.pop())

    def _open(self) -> None:
        buffer = self._free.pop() if self._free else self._allocate()
        buffer.flat.zero_()
        self._stack.append(buffer)
        self._attach(buffer)

    def _attach(self, buffer: _Buffer) -> None:
        for parameter, view in zip(self._parameters, buffer.views, strict=True):
            parameter.grad = view

    def _allocate(self) -> _Buffer:
        flat = self._empty(self._length)
        sizes = [p.numel() for p in self._parameters]
        parts = flat[: sum(sizes)].split(sizes)
        return _Buffer(flat, [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)])

    def _empty(self, length: int) -> Tensor:
        return torch.empty(length, dtype=self._parameters[0].dtype, device=self._parameters[0].device)


def add_over_ranks(values: Tensor, received: Tensor, world: World) -> None:
    """Add the flat `values` of all ranks in place; a multiple of their number long. `received` is scratch, half of it.

    Rank r first exchanges halves with r^1, then halves of its half with r^2, …: after log2(R) rounds it holds one part
    of the sum, ((0 + 1) + (2 + 3)) + …, and the same way back spreads the parts. a + b has the bits of b + a, and each
    part is computed in one place, so that all ranks end with the same bits.
    """
    if not is_power_of_two(world.size):
        dist.all_reduce(values)
        return
    rounds: list[tuple[int, Tensor, Tensor]] = []
    mine, distance = values, 1
    while distance < world.size:
        low, high = mine.chunk(2)
        mine, given = (high, low) if world.rank & distance else (low, high)
        partner, scratch = world.rank ^ distance, received[: len(mine)]
        _exchange(given, scratch, partner)
        mine.add_(scratch)
        rounds.append((partner, mine, given))
        distance *= 2
    for partner, mine, given in reversed(rounds):
        _exchange(mine, given, partner)


def _exchange(given: Tensor, received: Tensor, partner: int) -> None:
    both = [dist.P2POp(dist.isend, given, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
