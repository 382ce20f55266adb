"""From a spec to a task."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor

from trainkit.task import Batch, Task
from transformerlm.models.specs import AUTOREGRESSIVE, ModelSpec, Reading
from transformerlm.objectives.autoregressive import Autoregressive
from transformerlm.objectives.diffusion import MaskedDiffusion
from transformerlm.objectives.dual import Dual
from transformerlm.objectives.specs import AutoregressiveSpec, DiffusionSpec, DualSpec, NoiseSpec, ObjectiveSpec


@dataclass(frozen=True)
class NoiseContext:
    """What masking must know besides the spec."""

    mask_id: int
    forbidden: Tensor
    """bool [vocab_size], on the model's device: ids that stand for no text, the mask among them."""
    samples_per_step: int
    max_steps: int
    seed: int


class Objective(Task, Protocol):
    def prepare(self, batch: Batch, step: int) -> Batch:
        """What must be done to a batch on the CPU, ahead of the training thread, before `weights` and `loss` see it.

        `step` (from 0) is the one that it belongs to.
        """
        ...


def build_objective(spec: ObjectiveSpec, model: ModelSpec, noise: NoiseContext | None = None) -> Objective:
    """The task that trains a model of this spec; diffusion needs to know its `noise`."""
    match spec:
        case AutoregressiveSpec():
            return Autoregressive(spec, document_mask=model.document_mask)
        case DiffusionSpec():
            return _masked_diffusion(spec, noise)
        case DualSpec():
            assert noise is not None
            return Dual(
                spec,
                Autoregressive(AutoregressiveSpec(loss_chunk_size=spec.loss_chunk_size), model.document_mask),
                _masked_diffusion(_diffusion_half(spec), noise),
                max_steps=noise.max_steps,
            )


def reading_of(spec: ObjectiveSpec) -> Reading:
    """How the model that is trained for `spec` must be read."""
    match spec:
        case AutoregressiveSpec():
            return AUTOREGRESSIVE
        case DiffusionSpec():
            return Reading(modes=("diffusion",), alignment=spec.alignment, block_size=spec.block_size)
        case DualSpec():
            return Reading(modes=("ar", "diffusion"), alignment="shifted")


def passes_per_token(spec: ObjectiveSpec) -> int:
    """How often training runs a token through the model: a noisy and a clean copy with blocks, both halves if dual."""
    match spec:
        case AutoregressiveSpec():
            return 1
        case DiffusionSpec():
            return 2 if spec.block_size else 1
        case DualSpec():
            return 2


def _masked_diffusion(spec: DiffusionSpec, noise: NoiseContext | None) -> MaskedDiffusion:
    assert noise is not None and bool(noise.forbidden[noise.mask_id])
    return MaskedDiffusion(spec, noise.mask_id, noise.forbidden, noise.samples_per_step, noise.seed)


def _diffusion_half(spec: DualSpec) -> DiffusionSpec:
    shared = {field.name: getattr(spec, field.name) for field in fields(NoiseSpec)}
    return DiffusionSpec(**shared, loss_chunk_size=spec.loss_chunk_size, alignment="shifted")
