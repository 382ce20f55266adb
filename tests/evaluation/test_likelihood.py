"""Every token once, each document on its own, and sums that do not depend on how they are taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transformerlm.evaluation.likelihood import Scores, pack_documents, score_documents
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer
from transformerlm.objectives.readout import IGNORED

EOT, VOCAB, CONTEXT = 49, 50, 12
Documents = list[NDArray[np.uint16]]


def some_documents(lengths: list[int]) -> Documents:
    generator = np.random.default_rng(0)
    return [np.append(generator.integers(0, EOT, n), EOT).astype(np.uint16) for n in lengths]


DOCUMENTS = some_documents([3, 0, 11, 12, 5, 40, 7, 2, 25, 1])


@pytest.fixture(scope="module")
def model() -> Transformer:
    spec = TransformerSpec(context_length=CONTEXT, num_layers=2, d_model=32, num_heads=2)
    result = create_model(spec, vocab_size=VOCAB, seed=2).double()
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return result


def byte_lengths() -> NDArray[np.int64]:
    return np.arange(VOCAB, dtype=np.int64) % 4 + 1


def score(model: Transformer, documents: Documents, *, batch_size: int = 4, stride: int = 5) -> Scores:
    return score_documents(
        model,
        iter(documents),
        byte_lengths(),
        eot_id=EOT,
        context_length=CONTEXT,
        stride=stride,
        batch_size=batch_size,
    )


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=12), context=st.integers(1, 16), stride=st.integers(1, 16))
def test_rows_score_every_token_once_behind_the_right_context(lengths: list[int], context: int, stride: int) -> None:
    stride = min(stride, context)
    # Unique tokens, so that a target says where it comes from.
    documents = [np.append(np.arange(n) + 1000 * (d + 1), 0) for d, n in enumerate(lengths)]
    scored: list[list[int]] = [[] for _ in documents]
    for row in pack_documents(documents, context, stride, eot_id=0):
        assert all(len(array) == context for array in (row.inputs, row.targets, row.segments, row.documents))
        for t in np.flatnonzero(row.targets != IGNORED):
            number = row.documents[t]
            document = documents[number]
            place = len(scored[number])
            assert row.targets[t] == document[place]
            scored[number].append(place)
            # What the position may see: the part of its segment up to itself.
            visible = row.inputs[: t + 1][row.segments[: t + 1] == row.segments[t]]
            history = np.concatenate([[0], document[:place]])
            assert len(visible) <= len(history) and (visible == history[len(history) - len(visible) :]).all()
            assert len(visible) >= min(len(history), context - stride + 1)
        assert (row.targets[row.documents < 0] == IGNORED).all()
    assert [len(places) for places in scored] == [len(document) for document in documents]


def test_scores_are_the_chain_rule_token_by_token(model: Transformer) -> None:
    """A document that fits sees all of its past; a longer one what its window of the given stride holds."""
    scores = score(model, DOCUMENTS, stride=5)
    for index, document in enumerate(DOCUMENTS):
        inputs = [EOT, *document[:-1].tolist()]
        nats = 0.0
        for place, target in enumerate(document.tolist()):
            start = 5 * max(0, math.ceil((place + 1 - CONTEXT) / 5))
            logits = model(torch.tensor([inputs[start : place + 1]]))[0, -1].detach()
            nats -= float(logits.log_softmax(dim=-1)[target])
        assert scores.nats[index] == pytest.approx(nats, rel=1e-10)
    assert scores.tokens.tolist() == [len(document) for document in DOCUMENTS]
    assert scores.bytes.tolist() == [int(byte_lengths()[document[:-1]].sum()) for document in DOCUMENTS]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_neither_batches_nor_company_nor_order_matter(model: Transformer, batch_size: int) -> None:
    expected = score(model, DOCUMENTS).nats
    np.testing.assert_allclose(score(model, DOCUMENTS, batch_size=batch_size).nats, expected, rtol=1e-11)
    np.testing.assert_allclose(score(model, DOCUMENTS[::-1], batch_size=batch_size).nats, expected[::-1], rtol=1e-11)
    parts = np.concatenate([score(model, DOCUMENTS[:4]).nats, score(model, DOCUMENTS[4:]).nats])
    np.testing.assert_allclose(parts, expected, rtol=1e-11)


def test_totals_are_sums_and_not_means(model: Transformer) -> None:
    scores = score(model, DOCUMENTS)
    assert scores.loss == pytest.approx(scores.nats.sum() / sum(len(document) for document in DOCUMENTS))
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert scores.bits_per_byte == pytest.approx(scores.nats.sum() / math.log(2) / scores.bytes.sum())


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary() -> None:
    spec = TransformerSpec(context_length=CONTEXT, num_layers=1, d_model=16, num_heads=1)
    model = create_model(spec, vocab_size=VOCAB)
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert score(model, DOCUMENTS).loss == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_no_documents_have_no_bits(model: Transformer) -> None:
    scores = score(model, [])
    assert scores.loss == 0.0 and math.isnan(scores.bits_per_byte) and len(scores.nats) == 0


def test_the_excess_is_paired() -> None:
    reference = np.array([10.0, 200.0, 30.0, 50.0])
    differences = np.array([1.0, 2.0, 3.0, 4.0])
    ones = np.ones(4, dtype=np.int64)
    excess = Scores(reference + differences, ones, ones).excess_over(reference)
    assert excess.mean == pytest.approx(2.5)
    # The documents differ a hundred times as much as the pairs do, which does not blur the comparison.
    assert excess.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert excess.ratio == pytest.approx(10 / 290)
