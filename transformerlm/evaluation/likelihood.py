"""How likely a model finds a set of documents: every token scored exactly once, sums kept apart per document.

A document is scored on its own, from the end-of-text token that stands before it to the one that ends it, with its
nats counted and its bytes zero. Documents share rows to save work, but attention stays inside each: the score of one
depends neither on its neighbours nor on how many rows are computed at a time, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profiling import nvtx
from transformerlm.models.transformer import Head
from transformerlm.objectives.readout import IGNORED

IntArray = npt.NDArray[np.integer[Any]]

_POSITIONS_AT_ONCE = 4096
"""How many positions have logits at one time; a large vocabulary would fill the memory otherwise."""


@dataclass(frozen=True)
class Row:
    """`context_length` positions, int64 each."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    """The token to predict, `IGNORED` where there is none or where it has been scored already."""
    segments: npt.NDArray[np.int64]
    """Positions of one document, or of one window of a long one, share a number."""
    documents: npt.NDArray[np.int64]
    """Which document the position belongs to: its number in the order given; −1 in unused positions."""


@dataclass(frozen=True)
class Scores:
    """Sums of each document."""

    nats: npt.NDArray[np.float64]
    """−log p of the whole document and of its end."""
    tokens: npt.NDArray[np.int64]
    """Tokens scored, the end included."""
    bytes: npt.NDArray[np.int64]
    """UTF-8 bytes of the text."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / max(self.tokens.sum(), 1))

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; NaN where the bytes are not known."""
        total = int(self.bytes.sum())
        return float(self.nats.sum()) / math.log(2) / total if total else math.nan

    def excess_over(self, reference_nats: npt.ArrayLike) -> Excess:
        """Compare with another model's −log p of the same documents, in the same order, pair by pair."""
        reference = np.asarray(reference_nats, dtype=np.float64)
        assert reference.shape == self.nats.shape, "one reference for each document"
        differences = self.nats - reference
        count = len(differences)
        return Excess(
            mean=float(differences.mean()),
            standard_error=float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
            ratio=float(differences.sum() / reference.sum()),
        )


@dataclass(frozen=True)
class Excess:
    """How much worse than a reference."""

    mean: float
    """Nats per document."""
    standard_error: float
    """Of the mean, over documents. A mean below −3 of it would beat the truth: a bug."""
    ratio: float
    """Excess nats as a share of the reference's: 0.25 is 25 % above it."""


def score_documents(
    model: nn.Module,
    documents: Iterable[IntArray],
    byte_lengths: npt.NDArray[np.int64],
    *,
    eot_id: int,
    context_length: int,
    stride: int = 0,
    batch_size: int = 16,
) -> Scores:
    """Score documents (ids, the final end-of-text included), on the model's device, with the model's precision.

    `byte_lengths` int64 [vocab_size] is the tokenizer's table; `stride` as in `pack_documents`. Logits are at least
    32-bit, sums 64-bit. Documents are read as they are needed, `batch_size` rows at a time.
    """
    lengths = byte_lengths.copy()
    lengths[eot_id] = 0
    nats: list[float] = []
    tokens: list[int] = []
    num_bytes: list[int] = []

    def measured() -> Iterator[IntArray]:
        for document in documents:
            nats.append(0.0)
            tokens.append(len(document))
            num_bytes.append(int(lengths[document].sum()))
            yield document

    rows = pack_documents(measured(), context_length, stride, eot_id)
    while batch := list(islice(rows, batch_size)):
        with nvtx.range("score"):
            first, sums = _score_rows(model, batch)
        for index, value in enumerate(sums, start=first):
            nats[index] += value
    return Scores(np.array(nats), np.array(tokens, dtype=np.int64), np.array(num_bytes, dtype=np.int64))


def pack_documents(documents: Iterable[IntArray], context_length: int, stride: int, eot_id: int) -> Iterator[Row]:
    """Rows in which each token of each document is a target exactly once.

    Whole documents fill a row in order, as long as they fit. One longer than the context is cut into windows whose
    starts are `stride` tokens apart (0 = half the context): each scores the tokens that the one before did not reach,
    so that they see at least `context_length - stride` tokens.
    """
    stride = stride or max(1, context_length // 2)
    assert 1 <= stride <= context_length, "windows that lie further apart than they are long leave gaps"
    builder = _RowBuilder(context_length, eot_id)
    for index, document in enumerate(documents):
        inputs = np.concatenate([[eot_id], document[:-1]]).astype(np.int64)
        targets = document.astype(np.int64)
        for start, end, first_scored in windows(len(document), context_length, stride):
            if builder.used + end - start > context_length:
                yield builder.finish()
            wanted = targets[start:end].copy()
            wanted[: first_scored - start] = IGNORED
            builder.add(inputs[start:end], wanted, index)
    if builder.used:
        yield builder.finish()


def windows(length: int, context_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """`(start, end, first_scored)` of windows over range(length): the parts [first_scored, end) tile it."""
    start, scored = 0, 0
    while scored < length:
        end = min(start + context_length, length)
        yield start, end, scored
        start, scored = start + stride, end


class _RowBuilder:
    """The row that is being filled. Unused positions are a segment of their own, without a target."""

    def __init__(self, context_length: int, eot_id: int) -> None:
        self._context_length, self._eot_id = context_length, eot_id
        self._start_row()

    def _start_row(self) -> None:
        length = self._context_length
        self.used = 0
        self._num_segments = 0
        self._row = Row(
            inputs=np.full(length, self._eot_id, dtype=np.int64),
            targets=np.full(length, IGNORED, dtype=np.int64),
            segments=np.full(length, -1, dtype=np.int64),
            documents=np.full(length, -1, dtype=np.int64),
        )

    def add(self, inputs: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], document: int) -> None:
        place = slice(self.used, self.used + len(inputs))
        self._row.inputs[place], self._row.targets[place] = inputs, targets
        self._row.segments[place], self._row.documents[place] = self._num_segments, document
        self.used, self._num_segments = place.stop, self._num_segments + 1

    def finish(self) -> Row:
        row = self._row
        self._start_row()
        return row


@torch.inference_mode()
def _score_rows(model: nn.Module, rows: Sequence[Row]) -> tuple[int, list[float]]:
    """`(first, nats)`: what these rows add to the nats of the documents first, first + 1, …"""
    device = next(model.parameters()).device

    def stacked(arrays: Iterable[npt.NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.stack(list(arrays))).to(device)

    targets = stacked(row.targets for row in rows)
    nats: Tensor = model(
        stacked(row.inputs for row in rows),
        segments=stacked(row.segments for row in rows),
        readout=partial(_token_nats, targets=targets),
    )
    documents = np.concatenate([row.documents for row in rows])
    is_used = documents >= 0
    first = int(documents[is_used].min())
    values = nats.to("cpu", torch.float64).numpy()[is_used]
    return first, np.bincount(documents[is_used] - first, weights=values).tolist()


def _token_nats(hidden: Tensor, head: Head, *, targets: Tensor) -> Tensor:
    """−log p of each target, zero where there is none: [batch · length]."""
    chunks = zip(
        hidden.flatten(0, 1).split(_POSITIONS_AT_ONCE), targets.flatten().split(_POSITIONS_AT_ONCE), strict=True
    )
    return torch.cat(
        [F.cross_entropy(head(rows), wanted, ignore_index=IGNORED, reduction="none") for rows, wanted in chunks]
    )
