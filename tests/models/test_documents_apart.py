"""Packed documents do not see each other: to the bit, causal or not, fill included."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from trainkit.data.document_order import Place
from trainkit.data.packing import FILL, Document, best_fit, concatenate, rows
from transformerlm.models.build import create_model
from transformerlm.models.specs import AttentionBackend, TransformerSpec

LENGTH = 120
VOCAB = 90
EOT = VOCAB - 1


def packed_batch(packing: str, changed: int | None) -> tuple[Tensor, Tensor]:
    """Windows of the same lengths of documents whatever `changed`, the number of the one with another text."""
    lengths = [31, 77, 12, 50, 260, 9, 64, 40]
    texts = [np.random.default_rng(n).integers(0, EOT, length) for n, length in enumerate(lengths)]
    if changed is not None:
        texts[changed] = np.random.default_rng(1000).integers(0, EOT, lengths[changed])
    documents = (Document(n, Place(), np.append(text, EOT)) for n, text in enumerate(texts))
    match packing:
        case "concatenate":
            windows = list(islice(concatenate(documents, 0, length=LENGTH, eot_id=EOT), 4))
        case "best_fit":
            windows = list(islice(best_fit(documents, 0, length=LENGTH, eot_id=EOT, group_size=8, seed=0), 5))
        case _:
            windows = list(islice(rows(documents, 0, length=LENGTH, eot_id=EOT), 8))
    tokens, numbers = (torch.from_numpy(np.stack([window[i] for window in windows])) for i in (0, 1))
    return tokens, numbers


def segment_changes(tokens: Tensor, other: Tensor, segments: Tensor) -> Tensor:
    """bool [rows, length]: whether any input of a position's own segment differs."""
    differs = tokens != other
    same = segments.unsqueeze(1) == segments.unsqueeze(2)
    return (same & differs.unsqueeze(1)).any(dim=2)


@pytest.mark.parametrize("changed", [0, 1, 4, 6])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "rows"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_document_does_not_change_a_bit_of_another(
    causal: bool, backend: AttentionBackend, packing: str, changed: int
) -> None:
    spec = TransformerSpec(context_length=LENGTH, num_layers=2, d_model=32, num_heads=2, attention_backend=backend)
    model = create_model(spec, vocab_size=VOCAB)
    (tokens, numbers), (other, numbers_again) = packed_batch(packing, None), packed_batch(packing, changed)
    assert numbers.equal(numbers_again)
    assert (numbers == FILL).any() or packing == "concatenate"
    # As the autoregressive objective shifts, and as a bidirectional one does not.
    segments = numbers[:, 1:] if causal else numbers[:, :-1]
    with torch.no_grad():
        before, after = (model(t[:, :-1], segments=segments, causal=causal) for t in (tokens, other))
    may_change = segment_changes(tokens[:, :-1], other[:, :-1], segments)
    assert may_change.any() and not may_change.all()
    assert after[~may_change].equal(before[~may_change])
    assert not after[may_change].equal(before[may_change])


@pytest.mark.parametrize("causal", [True, False])
def test_rotary_embeddings_need_no_new_positions(causal: bool) -> None:
    model = create_model(
        TransformerSpec(context_length=LENGTH, num_layers=2, d_model=32, num_heads=2), vocab_size=VOCAB
    ).double()
    tokens, numbers = packed_batch("best_fit", None)
    segments = numbers[:, 1:]
    within = torch.tensor(
        [[sum(row[j] == row[i] for j in range(i)) for i in range(LENGTH)] for row in segments.tolist()]
    )
    with torch.no_grad():
        plain, anew = (
            model(tokens[:, :-1], segments=segments, positions=positions, causal=causal) for positions in (None, within)
        )
    torch.testing.assert_close(anew, plain, rtol=1e-6, atol=1e-6)
