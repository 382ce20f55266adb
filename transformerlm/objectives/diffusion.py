"""Masked diffusion: restore the masked tokens of a window, each weighted so that the mean bounds the likelihood.

The estimate for one sample is  Σ over masked i of w(t) · −log p(token i | noisy window) / eligible tokens; see
`transformerlm.objectives.noise` for t and w, and docs/decisions/005 for what is eligible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.random import Purpose, uniform
from trainkit.task import Batch, Loss
from transformerlm.models.transformer import Head
from transformerlm.models.visibility import denoising_arguments
from transformerlm.objectives.noise import draw_mask, loss_weight, mask_probability, stratified_times
from transformerlm.objectives.readout import sum_terms
from transformerlm.objectives.specs import DiffusionSpec

BUCKETS = 4
"""Equal parts of the range of mask probabilities whose losses are logged apart."""
CAPACITY_PARTS = 8
"""The masked positions of a micro-batch are padded to a multiple of this share of all: few shapes for a compiler."""


@dataclass(frozen=True)
class MaskedDiffusion:
    """A `trainkit.task.Task` for batches that `prepare` has been applied to."""

    spec: DiffusionSpec
    mask_id: int
    forbidden: Tensor
    """bool [vocab_size], on the model's device: ids that stand for no text (the mask itself, padding, gaps)."""
    samples_per_step: int
    seed: int

    def prepare(self, batch: Batch, step: int) -> Batch:
        """The batch with its noise, which depends on its samples' numbers; on the CPU, before it goes to the device.

        From `tokens`, `documents` (int64 [rows, context_length + 1], −1 = fill), `sample` and `valid`: adds `noisy`
        int64 [rows, context_length], and for each masked token its place in the flattened window, `masked`, its
        `loss_weight` and its `mask_probability` (padding: place 0, weight and probability 0); `segments` where
        attention must tell tokens apart. `eligible` bool [rows, context_length] says what may be masked.
        """
        del step
        clean, documents = batch["tokens"][:, :-1], batch["documents"][:, :-1]
        documents = self._cut_some_short(batch["sample"], documents)
        eligible = (documents >= 0) & batch["valid"].unsqueeze(1)
        if self.spec.alignment == "shifted":
            eligible[:, 0] = False
        length = clean.shape[1]
        block_size = self.spec.block_size or length
        times = stratified_times(
            self.seed, batch["sample"], samples_per_step=self.samples_per_step, blocks=-(-length // block_size)
        ).repeat_interleave(block_size, dim=1)[:, :length]
        probability = mask_probability(self.spec, times)
        masked = draw_mask(self.seed, batch["sample"], probability, eligible)
        places = masked.flatten().nonzero().squeeze(1)
        corrupted = {
            **batch,
            "noisy": clean.masked_fill(masked, self.mask_id),
            "eligible": eligible,
            "masked": _pad(places, masked.numel()),
            "loss_weight": _pad(loss_weight(self.spec, times).flatten()[places].float(), masked.numel()),
            "mask_probability": _pad(probability.flatten()[places].float(), masked.numel()),
        }
        if self.spec.document_mask:
            corrupted["segments"] = documents
        elif (documents < 0).any():
            corrupted["segments"] = torch.where(documents < 0, -1, 0)
        return corrupted

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": batch["eligible"].sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        sums = self._predict(model, batch)
        nats, by_bucket, counts = sums[0], sums[1 : 1 + BUCKETS].detach(), sums[1 + BUCKETS :].detach()
        eligible = batch["eligible"].sum()
        metrics = {
            "loss": (nats.detach(), eligible),
            "mask_fraction": (counts.sum(), eligible),
            **{f"masked_loss/{name}": (by_bucket[i], counts[i]) for i, name in enumerate(bucket_names())},
        }
        return Loss(nats / denominators["loss"], metrics)

    def _predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted nats, then the plain nats of each bucket, then how many tokens each bucket has."""
        arguments = denoising_arguments(
            batch["noisy"],
            batch["tokens"][:, :-1],
            mask_id=self.mask_id,
            block_size=self.spec.block_size,
            segments=batch.get("segments"),
        )
        return model(**arguments, readout=partial(self._readout, batch=batch))

    def _readout(self, hidden: Tensor, head: Head, *, batch: Batch) -> Tensor:
        """Only masked positions reach the head."""
        places, length = batch["masked"], batch["noisy"].shape[1]
        rows, columns = places // length, places % length
        targets = batch["tokens"][rows, columns]
        # A padded place is 0: its weight makes it count nothing, the clamp keeps it inside.
        speaks = columns if self.spec.alignment == "in_place" else (columns - 1).clamp(min=0)
        terms = partial(_terms, forbidden=self.forbidden)
        return sum_terms(
            terms,
            hidden[rows, speaks],
            head,
            targets,
            batch["loss_weight"],
            batch["mask_probability"],
            chunk_size=self.spec.loss_chunk_size,
        )

    def _cut_some_short(self, samples: Tensor, documents: Tensor) -> Tensor:
        """The document numbers, a random share of the rows cut to a random length of at least one token."""
        if not self.spec.random_length_fraction:
            return documents
        numbers = uniform(self.seed, Purpose.DIFFUSION_LENGTH, samples, 2)
        length = documents.shape[1]
        kept = 1 + (numbers[:, 1] * length).long().clamp(max=length - 1)
        kept = torch.where(numbers[:, 0] < self.spec.random_length_fraction, kept, length)
        return documents.masked_fill(torch.arange(length) >= kept.unsqueeze(1), -1)


def bucket_names() -> list[str]:
    """`0.00-0.25` and so on: which mask probabilities a bucket holds."""
    return [f"{i / BUCKETS:.2f}-{(i + 1) / BUCKETS:.2f}" for i in range(BUCKETS)]


def _terms(logits: Tensor, targets: Tensor, weight: Tensor, probability: Tensor, *, forbidden: Tensor) -> Tensor:
    """What `MaskedDiffusion._predict` returns, for some of the masked tokens."""
    is_real = probability > 0
    nats = F.cross_entropy(logits.masked_fill(forbidden, -torch.inf), targets, reduction="none")
    nats = nats.where(is_real, 0.0)
    bucket = (probability * BUCKETS).long().clamp(max=BUCKETS - 1)
    zeros = nats.new_zeros(BUCKETS)
    return torch.cat(
        [
            (weight * nats).sum().unsqueeze(0),
            zeros.index_add(0, bucket, nats.detach()),
            zeros.index_add(0, bucket, is_real.to(nats.dtype)),
        ]
    )


def _pad(values: Tensor, total: int) -> Tensor:
    """Zeros after `values`, up to the next multiple of a fixed share of `total`."""
    part = -(-total // CAPACITY_PARTS)
    return F.pad(values, (0, max(part, -(-len(values) // part) * part) - len(values)))
