"""Run a function on several real gloo ranks, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainkit.distribution import World, open_world
from trainkit.launch import launch
from trainkit.specs import TrainingSpec


def run_on_ranks(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on each of `size` ranks; returns what they returned, by rank."""
    launch(size, _one_rank, function, folder, arguments)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _one_rank(function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    with open_world(TrainingSpec(device="cpu", threads=1)) as world:
        torch.save(function(world, *arguments), folder / f"rank-{os.environ['RANK']}.pt")


def alone() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"))
