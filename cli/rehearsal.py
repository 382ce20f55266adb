"""A run is tried on made-up text before its data are opened: what does not fit or compile fails at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from config.schemas import TrainConfig
from trainkit.batch_size_search import find_batch_size
from trainkit.distribution import World
from trainkit.errors import UserError
from trainkit.rehearsal import Rehearsal, rehearse
from trainkit.replicas import check_distribution
from trainkit.specs import TrainingSpec
from trainkit.task import Batch
from transformerlm.objectives.build import Objective

DEFAULT_BATCH_SIZE = 8
"""Micro-batch of `training.device_batch_size = 0` where memory is no matter of measurement: anywhere but on CUDA."""
_BYTES = 256
"""Ids below this are bytes in every tokenizer, never a mask or padding."""


def rehearsed(config: TrainConfig, objective: Objective, world: World, build: Callable[[], nn.Module]) -> TrainConfig:
    """The configuration with a number for `training.device_batch_size`, tried once; every rank calls it.

    Raises `UserError` with the numbers where the run does not fit.
    """
    samples = config.training.total_batch_size // config.model.context_length
    most = -(-samples // world.size)
    attempt = partial(_attempt, config, objective, world, build)
    rows = config.training.device_batch_size
    if not rows and world.device.type != "cuda":
        rows = min(DEFAULT_BATCH_SIZE, most)
    if not rows:
        # Without compiling, which would be done anew for each size: it only lowers what is needed.
        eager = replace(config.training, compile=False)
        rows = find_batch_size(lambda n: attempt(n, eager).fits_comfortably, most)
        if not rows:
            raise _does_not_fit(config, attempt(1, eager), world, rows=1)
    training = replace(config.training, device_batch_size=rows)
    check_distribution(config.distributed, training, config.optimizer, samples, world.size)
    outcome = attempt(min(rows, most), training)
    if not outcome.fits:
        raise _does_not_fit(config, outcome, world, rows=min(rows, most))
    return config.model_copy(update={"training": training})


def _attempt(
    config: TrainConfig,
    objective: Objective,
    world: World,
    build: Callable[[], nn.Module],
    rows: int,
    training: TrainingSpec,
) -> Rehearsal:
    return rehearse(
        build,
        objective,
        objective.prepare(made_up_batch(rows, config.model.context_length), 0),
        world,
        training=training,
        optimizer=config.optimizer,
        distributed=config.distributed,
    )


def made_up_batch(rows: int, context_length: int) -> Batch:
    """Windows as every source yields them: one document, no fill, all rows valid."""
    shape = (rows, context_length + 1)
    return {
        "tokens": torch.arange(rows * (context_length + 1)).view(shape) % _BYTES,
        "documents": torch.zeros(shape, dtype=torch.int64),
        "sample": torch.arange(rows),
        "valid": torch.ones(rows, dtype=torch.bool),
    }


def _does_not_fit(config: TrainConfig, outcome: Rehearsal, world: World, *, rows: int) -> UserError:
    needs = f"need about {_gib(outcome.needs)}" if outcome.needs else "need more memory than there is"
    has = f", and {world.device} has {_gib(outcome.has)} of it" if outcome.has else f" on {world.device}"
    ways = ["lower training.device_batch_size (the step stays the same)"] if rows > 1 else []
    if config.training.activation_checkpointing == "none":
        ways.append('set training.activation_checkpointing = "blocks"')
    if config.training.precision == "fp32":
        ways.append('set training.precision = "bf16"')
    ways.append("make the model or model.context_length smaller")
    return UserError(
        f"{rows} windows of {config.model.context_length:,} tokens in a model of {config.model.num_layers} layers of "
        f"width {config.model.d_model} {needs}{has}: {', or '.join(ways)}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
