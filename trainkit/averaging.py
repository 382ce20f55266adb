"""An exponential moving average of the weights (Polyak & Juditsky 1992), for evaluation and inference."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def start_average(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable weights by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int, skip: Tensor) -> None:
    """Move `average` towards the weights after update number `step` (1-based), unless `skip` (bool scalar) says so.

    Early on the decay is smaller, (1 + step) / (10 + step), so that the random start does not linger.
    """
    parameters = dict(model.named_parameters())
    current = [parameters[name].detach() for name in average]
    # A tensor, so that the device decides about skipping: nobody waits for its answer.
    weight = torch.where(skip, 0.0, 1 - min(decay, (1 + step) / (10 + step))).to(current[0].dtype)
    torch._foreach_lerp_(list(average.values()), current, [weight] * len(current))  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def averaged_weights(model: nn.Module, average: dict[str, Tensor]) -> Generator[None]:
    """Within the block the model holds the averaged weights; after it, its own again, to the bit."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].detach().clone() for name in average}
    _copy(average, parameters)
    try:
        yield
    finally:
        _copy(own, parameters)


@torch.no_grad()
def _copy(source: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, value in source.items():
        parameters[name].copy_(value)
