"""What a training run will take, before anything is rented: memory of each GPU, tokens per second, hours.

From the settings alone; the model is built on the `meta` device, which has shapes and no numbers. Weights, gradients
and optimizer are exact. Activations are those of a run without `torch.compile`, which keeps less. What CUDA and the
allocator take for themselves is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from config.schemas import Experiment
from trainkit.optimizers import split_parameters
from trainkit.specs import AdamWSpec, MuonSpec, OptimizerSpec
from trainkit.throughput import PEAKS
from transformerlm.models.build import empty_model
from transformerlm.models.sizes import activation_bytes, flops_per_token, logit_bytes
from transformerlm.models.transformer import Transformer
from transformerlm.objectives.build import passes_per_token

SINGLE = 4
"""Bytes of a 32-bit float: weights, gradients and optimizer state, whatever the precision of the arithmetic."""


@dataclass(frozen=True)
class Hardware:
    """One or more GPUs of a kind."""

    label: str
    gpu: str
    """As in `trainkit.throughput.PEAKS`."""
    memory_gib: int
    gpus: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    """Of the weights, where one is kept."""
    passing: int
    """Only while a micro-batch passes forward and backward: 16-bit copies of the weights, activations, logits."""
    updating: int
    """Only during the update, when activations are gone."""

    @property
    def held(self) -> int:
        """At all times."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def peak(self) -> int:
        return self.held + max(self.passing, self.updating)


def count_parameters(config: Experiment, vocab_size: int) -> int:
    return _count(list(_meta_model(config, vocab_size).parameters()))


def estimate_memory(config: Experiment, vocab_size: int, gpus: int = 1) -> Memory:
    """Of a run for next tokens with `device_batch_size` windows a pass, on `gpus` that share it by `strategy`.

    `zero1` divides the optimizer's state; after an update each rank sends and receives weights in a buffer as large as
    all of them. `fsdp` divides weights and optimizer; gradients stay whole while micro-batches accumulate, and two
    blocks at a time are gathered. 16-bit arithmetic keeps a 16-bit copy of each weight through a forward pass.
    """
    model, training, distributed = _meta_model(config, vocab_size), config.training, config.distributed
    parameters = _count(list(model.parameters()))
    state = optimizer_bytes(config.optimizer, model)
    weights = average = SINGLE * parameters
    is_fsdp, is_zero1 = ((distributed.strategy == strategy and gpus > 1) for strategy in ("fsdp", "zero1"))
    gathered = 0
    if is_fsdp:
        gathered = 2 * SINGLE * _count(list(model.blocks[0].parameters()))
        weights, average = weights // gpus, average // gpus
    accumulates = training.total_batch_size > gpus * training.device_batch_size * config.model.context_length
    value_bytes = SINGLE if training.precision == "fp32" else 2
    passing = gathered + activation_bytes(
        config.model,
        rows=training.device_batch_size,
        value_bytes=value_bytes,
        recompute=training.activation_checkpointing == "blocks",
    )
    passing += logit_bytes(
        config.model, vocab_size, rows=training.device_batch_size, chunk_size=config.objective.loss_chunk_size
    )
    if value_bytes < SINGLE:
        passing += value_bytes * parameters
    return Memory(
        weights=weights,
        gradients=SINGLE * parameters // (gpus if is_fsdp and not accumulates else 1),
        optimizer=state // (gpus if is_fsdp or is_zero1 else 1),
        average=average if training.ema_decay else 0,
        passing=passing,
        updating=(weights if config.logging.norms_every else 0) + (SINGLE * parameters if is_zero1 else 0),
    )


def optimizer_bytes(spec: OptimizerSpec, model: nn.Module) -> int:
    """AdamW keeps two numbers for each parameter, Muon one for those of hidden matrices and two for the rest; AdamW
    also counts the steps of each tensor."""
    matrices, rest = ([p for _, p in part] for part in split_parameters(model))
    match spec:
        case AdamWSpec():
            return SINGLE * (2 * _count(matrices + rest) + len(matrices + rest))
        case MuonSpec():
            return SINGLE * (_count(matrices) + 2 * _count(rest) + len(rest))


def tokens_per_second(config: Experiment, vocab_size: int, hardware: Hardware, utilisation: float) -> float:
    """Where the GPUs spend the share `utilisation` of their peak on matrices. What is computed again in the backward
    pass is work, but no progress: four passes instead of three."""
    flops = flops_per_token(config.model, vocab_size) * passes_per_token(config.objective)
    if config.training.activation_checkpointing == "blocks":
        flops *= 4 / 3
    return utilisation * PEAKS[hardware.gpu] * hardware.gpus / flops


def run_tokens(config: Experiment) -> int:
    """All that a run without ramps of the batch trains on."""
    return config.training.max_steps * config.training.total_batch_size


def _meta_model(config: Experiment, vocab_size: int) -> Transformer:
    return empty_model(config.model, vocab_size=vocab_size, device="meta")


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
