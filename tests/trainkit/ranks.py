"""Run a function on several real gloo ranks, each in a process of its own.

They are forked from a server that has imported PyTorch once: importing it takes longer than most of what they do.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from trainkit.distribution import World, open_world
from trainkit.launch import _environment
from trainkit.specs import TrainingSpec

PATIENCE = 240.0
"""Seconds for ranks on a busy machine, from the first that ends to the last."""


def run_on_ranks(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on each of `size` ranks; returns what they returned, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.trainkit.test_loop"])
    shared = _environment(size)
    ranks = [
        context.Process(
            target=_one_rank,
            args=({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, folder, arguments),
            daemon=True,
        )
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        running = {rank.sentinel: rank for rank in ranks}
        while running:
            for ended in wait(list(running), None if len(running) == size else PATIENCE) or list(running):
                rank = running.pop(ended)
                assert rank.exitcode == 0, f"{rank.name} ended with {rank.exitcode}; what it wrote stands above"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _one_rank(
    environment: dict[str, str], function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ |= environment
    with open_world(TrainingSpec(device="cpu", threads=1)) as world:
        torch.save(function(world, *arguments), folder / f"rank-{os.environ['RANK']}.pt")


def alone() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"))
