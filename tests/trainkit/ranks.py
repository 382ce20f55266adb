"""Run a function on several real gloo ranks, each in a process of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from trainkit.distribution import World, open_world
from trainkit.specs import TrainingSpec


def run_on_ranks(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on each of `size` ranks; returns what they returned, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_one_rank, (size, port, function, folder, arguments), nprocs=size)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _one_rank(
    rank: int, size: int, port: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    with open_world(TrainingSpec(device="cpu", threads=1)) as world:
        torch.save(function(world, *arguments), folder / f"rank-{rank}.pt")


def alone() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"))
