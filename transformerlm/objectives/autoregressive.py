"""Predict each token from the ones before it in its document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.task import Batch, Loss
from transformerlm.models.transformer import Head
from transformerlm.objectives.readout import IGNORED, sum_terms
from transformerlm.objectives.specs import AutoregressiveSpec


@dataclass(frozen=True)
class Autoregressive:
    """A `trainkit.task.Task`: a window's tokens but the last are the input, all but the first are the targets.

    A batch holds `tokens` and `documents`, int64 [rows, context_length + 1], and `valid`, bool [rows]. A token of
    document -1 is fill and no target.
    """

    spec: AutoregressiveSpec
    document_mask: bool
    """Whether attention stays inside each document."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        """As it is: nothing is drawn."""
        del step
        return batch

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        count = _is_target(batch).sum()
        return {name: count for name in self._term_names}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        tokens = batch["tokens"]
        targets = tokens[:, 1:].masked_fill(~_is_target(batch), IGNORED)
        # A position belongs to the document that it predicts: the end-of-text token that closes one document is, as
        # input, the beginning of the next.
        segments = batch["documents"][:, 1:] if self.document_mask else None
        readout = partial(
            _readout, targets=targets, with_z_loss=self.spec.z_loss > 0, chunk_size=self.spec.loss_chunk_size
        )
        sums = dict(zip(self._term_names, model(tokens[:, :-1], segments=segments, readout=readout), strict=True))
        value = sums["loss"] / denominators["loss"]
        if self.spec.z_loss > 0:
            value = value + self.spec.z_loss * sums["z_loss"] / denominators["z_loss"]
        counts = self.weights(batch)
        return Loss(value, {name: (total.detach(), counts[name]) for name, total in sums.items()})

    @property
    def _term_names(self) -> tuple[str, ...]:
        return ("loss", "z_loss") if self.spec.z_loss > 0 else ("loss",)


def _is_target(batch: Batch) -> Tensor:
    """bool [rows, context_length]."""
    return (batch["documents"][:, 1:] >= 0) & batch["valid"].unsqueeze(1)


def _readout(hidden: Tensor, head: Head, *, targets: Tensor, with_z_loss: bool, chunk_size: int) -> Tensor:
    terms = _nats_and_squares if with_z_loss else _nats
    return sum_terms(terms, hidden, head, targets, chunk_size=chunk_size)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").unsqueeze(0)


def _nats_and_squares(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss, and the squared log-partition of the rows that count."""
    squares = logits.logsumexp(dim=-1).square().masked_fill(targets == IGNORED, 0.0)
    return torch.cat([_nats(logits, targets), squares.sum().unsqueeze(0)])
