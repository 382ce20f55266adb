"""One network, two ways to write: α · AR + (1 − α) · masked diffusion on the same windows.

Both read the head alike, the logits at a place are about the next token (`shifted`), so that neither unlearns what the
other taught. α moves linearly from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainkit.task import Batch, Loss
from transformerlm.objectives.autoregressive import Autoregressive
from transformerlm.objectives.diffusion import MaskedDiffusion
from transformerlm.objectives.specs import DualSpec


@dataclass(frozen=True)
class Dual:
    """A `trainkit.task.Task` for batches that `prepare` has been applied to."""

    spec: DualSpec
    ar: Autoregressive
    diffusion: MaskedDiffusion
    max_steps: int

    def prepare(self, batch: Batch, step: int) -> Batch:
        """The diffusion half's noise, and `ar_weight`, float32 [rows]: α in this step."""
        done = min(step / max(self.max_steps - 1, 1), 1.0)
        alpha = self.spec.ar_weight + (self.spec.final_ar_weight - self.spec.ar_weight) * done
        return {**self.diffusion.prepare(batch, step), "ar_weight": torch.full(batch["sample"].shape, alpha)}

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        halves = {"ar": self.ar.weights(batch), "diffusion": self.diffusion.weights(batch)}
        return {f"{half}/{name}": value for half, values in halves.items() for name, value in values.items()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        alpha = batch["ar_weight"][0]  # all samples of a step have the same
        ar = self.ar.loss(model, batch, _of("ar", denominators))
        diffusion = self.diffusion.loss(model, batch, _of("diffusion", denominators))
        value = alpha * ar.value + (1 - alpha) * diffusion.value
        # The shares of a step's micro-batches sum to one, so that the log shows the step's mixed loss.
        share = self.ar.weights(batch)["loss"] / denominators["ar/loss"]
        metrics = {
            "loss": (value.detach(), share),
            **{f"ar/{name}": metric for name, metric in ar.metrics.items()},
            **{f"diffusion/{name}": metric for name, metric in diffusion.metrics.items()},
            "ar_weight": (alpha * share, share),
        }
        return Loss(value, metrics)


def _of(half: str, denominators: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{half}/"): value for name, value in denominators.items() if name.startswith(f"{half}/")}
