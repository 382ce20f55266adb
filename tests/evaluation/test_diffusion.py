"""The likelihood of a diffusion model against enumeration: all orders, all masks, on a handful of tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from transformerlm.evaluation.diffusion import Window, cut_windows, score_bound, score_left_to_right
from transformerlm.inference import denoising
from transformerlm.inference.denoising import Denoiser
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec

VOCAB, EOT, MASK = 5, 3, 4
LENGTH = 5
DOCUMENTS = [np.array([2, 0, EOT]), np.array([1, EOT]), np.array([0, 0, 2, 1, 1, EOT])]
BYTES = np.array([1, 1, 2, 0, 0])


def denoiser(*, noise_embedding: bool = False, **settings: Any) -> Denoiser:
    spec = TransformerSpec(
        context_length=LENGTH, num_layers=2, d_model=16, num_heads=2, noise_embedding=noise_embedding
    )
    model = create_model(spec, vocab_size=VOCAB, seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return Denoiser(model, MASK, torch.tensor([False] * 4 + [True]), **settings)


def windows() -> list[Window]:
    return list(cut_windows(DOCUMENTS, LENGTH, EOT))


@torch.no_grad()
def chain_rule(one: Denoiser, window: Window, order: tuple[int, ...]) -> dict[int, float]:
    """Nats of each place when they are uncovered in this order; fill is cut off instead of masked."""
    used = int((window.documents >= 0).sum())
    tokens = torch.from_numpy(window.tokens[:used])
    noisy = tokens.clone()
    noisy[list(order)] = MASK
    nats = {}
    for place in order:
        level = (noisy == MASK).double().mean().expand(1, used)
        logits = one.model(noisy.unsqueeze(0), causal=False, noise_level=level)[0, place - (one.alignment == "shifted")]
        nats[place] = float(F.cross_entropy(logits.masked_fill(one.forbidden, -math.inf), tokens[place]))
        noisy[place] = tokens[place]
    return nats


def by_document(nats: list[dict[int, float]]) -> np.ndarray[Any, Any]:
    totals = np.zeros(len(DOCUMENTS))
    for window, places in zip(windows(), nats, strict=True):
        for place, value in places.items():
            totals[window.documents[place]] += value
    return totals


def mean_over_orders(one: Denoiser) -> np.ndarray[Any, Any]:
    means = []
    for window in windows():
        orders = list(itertools.permutations(np.flatnonzero(window.eligible).tolist()))
        chains = [chain_rule(one, window, order) for order in orders]
        means.append({place: sum(chain[place] for chain in chains) / len(chains) for place in orders[0]})
    return by_document(means)


def test_windows_share_one_token_and_score_every_other_once() -> None:
    found = windows()
    stream = [EOT, *np.concatenate(DOCUMENTS).tolist()]
    scored = [token for window in found for token in window.tokens[window.eligible].tolist()]
    assert scored == stream[1:]
    for before, after in itertools.pairwise(found):
        assert after.tokens[0] == before.tokens[-1] and not after.eligible[0]
    owners = np.concatenate([window.documents[window.eligible] for window in found])
    assert np.bincount(owners).tolist() == [len(document) for document in DOCUMENTS]


@pytest.mark.parametrize("fixed_count", [True, False])
@pytest.mark.parametrize("settings", [{}, {"alignment": "shifted"}])
def test_both_estimators_have_the_mean_over_all_orders(settings: dict[str, Any], fixed_count: bool) -> None:
    one = denoiser(**settings)
    expected = mean_over_orders(one)
    bound = score_bound(
        one, DOCUMENTS, BYTES, eot_id=EOT, context_length=LENGTH, draws=256, replicates=8, fixed_count=fixed_count,
        batch_size=256,
    )  # fmt: skip
    assert abs(bound.scores.nats.sum() - expected.sum()) < 5 * bound.standard_error
    assert bound.standard_error < 0.03 * expected.sum()
    np.testing.assert_allclose(bound.scores.nats, expected, rtol=0.15)
    assert bound.scores.tokens.tolist() == [3, 2, 6] and bound.scores.bytes.tolist() == [3, 1, 6]


def test_the_reported_error_is_the_spread_of_the_estimate() -> None:
    """With two replicates, as `transformerlm-eval` has: a variance of each estimate that is right in the mean."""
    one = denoiser()
    settings = {"eot_id": EOT, "context_length": LENGTH, "draws": 2, "replicates": 2}
    bounds = [score_bound(one, DOCUMENTS, BYTES, seed=seed, **settings) for seed in range(150)]
    spread = np.std([bound.scores.nats.sum() for bound in bounds], ddof=1)
    reported = math.sqrt(np.mean([bound.standard_error**2 for bound in bounds]))
    assert 0.8 < reported / spread < 1.25


def test_the_fixed_count_has_less_variance() -> None:
    one = denoiser()
    settings = {"eot_id": EOT, "context_length": LENGTH, "draws": 8, "replicates": 16}
    errors = {
        kind: score_bound(one, DOCUMENTS, BYTES, fixed_count=kind, **settings).standard_error for kind in (True, False)
    }
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("alignment", ["in_place", "shifted"])
def test_left_to_right_is_that_one_order(alignment: Any) -> None:
    one = denoiser(alignment=alignment)
    expected = by_document([chain_rule(one, w, tuple(np.flatnonzero(w.eligible).tolist())) for w in windows()])
    scores = score_left_to_right(one, DOCUMENTS, BYTES, eot_id=EOT, context_length=LENGTH, batch_size=3)
    np.testing.assert_allclose(scores.nats, expected, rtol=1e-10)


def test_blocks_of_one_token_have_one_order_and_no_error() -> None:
    """Every estimate is the chain rule itself, so that bound and left-to-right likelihood are the same number."""
    one = denoiser(block_size=1)
    bound = score_bound(one, DOCUMENTS, BYTES, eot_id=EOT, context_length=LENGTH, draws=1)
    exact = score_left_to_right(one, DOCUMENTS, BYTES, eot_id=EOT, context_length=LENGTH)
    np.testing.assert_allclose(bound.scores.nats, exact.nats, rtol=1e-10)
    assert bound.standard_error < 1e-9


def test_a_model_that_is_told_the_share_of_masks_still_has_a_bound() -> None:
    """Without fill, which the counted share would tell apart from a text that ends."""
    one = denoiser(noise_embedding=True)
    documents = [np.array([2, 0, 1, EOT])]
    [window] = cut_windows(documents, LENGTH, EOT)
    chains = [chain_rule(one, window, order) for order in itertools.permutations(range(1, LENGTH))]
    expected = sum(sum(chain.values()) for chain in chains) / len(chains)
    bound = score_bound(one, documents, BYTES, eot_id=EOT, context_length=LENGTH, draws=256, replicates=8)
    assert abs(bound.scores.nats.sum() - expected) < 5 * bound.standard_error
    ignorant = score_bound(denoiser(), documents, BYTES, eot_id=EOT, context_length=LENGTH, draws=256, replicates=8)
    assert abs(ignorant.scores.nats.sum() - expected) > 8 * bound.standard_error


def test_the_bound_of_blocks_lies_between() -> None:
    """With blocks of two every order inside a block: by enumeration over the orders of each block."""
    one = denoiser(block_size=2)
    expected = 0.0
    for window in windows():
        used = int((window.documents >= 0).sum())
        tokens = torch.from_numpy(window.tokens[:used])
        for start in range(0, used, 2):
            places = [p for p in range(start, min(start + 2, used)) if window.eligible[p]]
            orders = list(itertools.permutations(places))
            for order in orders:
                text = tokens[: min(start + 2, used)].clone()
                text[places] = MASK
                for place in order:
                    asked = torch.zeros(1, len(text), dtype=torch.bool)
                    asked[0, place] = True
                    logits = one.logits(text.unsqueeze(0), asked)
                    expected += float(F.cross_entropy(logits, tokens[place : place + 1])) / len(orders)
                    text[place] = tokens[place]
    bound = score_bound(one, DOCUMENTS, BYTES, eot_id=EOT, context_length=LENGTH, draws=128, replicates=8)
    assert abs(bound.scores.nats.sum() - expected) < 5 * bound.standard_error + 1e-9
    assert bound.standard_error < 0.03 * expected


def test_the_result_does_not_depend_on_the_pieces_that_logits_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = {"eot_id": EOT, "context_length": LENGTH, "draws": 6, "batch_size": 4}
    whole = score_bound(denoiser(), DOCUMENTS, BYTES, **settings)
    monkeypatch.setattr(denoising, "PIECE", 7)
    pieces = score_bound(denoiser(), DOCUMENTS, BYTES, **settings)
    np.testing.assert_allclose(pieces.scores.nats, whole.scores.nats, rtol=1e-12)


def test_the_result_does_not_depend_on_the_batch_size() -> None:
    one = denoiser()
    settings = {"eot_id": EOT, "context_length": LENGTH, "draws": 6}
    first, second = (score_bound(one, DOCUMENTS, BYTES, batch_size=size, **settings) for size in (1, 6))
    np.testing.assert_allclose(first.scores.nats, second.scores.nats, rtol=1e-10)
