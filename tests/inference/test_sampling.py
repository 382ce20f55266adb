"""Samplers against brute force and against the distribution that they should draw from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformerlm.inference.sampling import adjusted_log_probs, invert_cumulative, random_numbers, sample_tokens
from transformerlm.inference.specs import SamplingSpec

logit_rows = st.lists(st.sampled_from([-math.inf, *(k / 8 for k in range(-24, 25))]), min_size=2, max_size=9)


def brute_force(logits: list[float], spec: SamplingSpec, seen: list[bool]) -> list[float]:
    """Probabilities by the definitions, one id at a time."""
    ids = range(len(logits))
    if spec.repetition_penalty != 1.0:
        penalty = spec.repetition_penalty
        logits = [(x / penalty if x > 0 else x * penalty) if s else x for x, s in zip(logits, seen, strict=True)]
    logits = [x / spec.temperature for x in logits]

    def probabilities(kept: list[int]) -> list[float]:
        weights = [math.exp(logits[i]) if i in kept else 0.0 for i in ids]
        return [w / sum(weights) for w in weights]

    kept = list(ids)
    if spec.top_k:
        kept = [i for i in kept if sum(logits[j] > logits[i] for j in ids) < spec.top_k]
    if spec.top_p < 1.0:
        p = probabilities(kept)
        order = sorted(ids, key=lambda i: (-p[i], i))
        size = next(n for n in range(1, len(order) + 1) if sum(p[i] for i in order[:n]) >= spec.top_p - 1e-12)
        kept = order[:size]
    if spec.min_p > 0.0:
        p = probabilities(kept)
        kept = [i for i in kept if p[i] >= spec.min_p * max(p) - 1e-12]
    return probabilities(kept)


@settings(deadline=None, max_examples=300)
@given(
    logits=logit_rows.filter(lambda row: max(row) > -math.inf),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 10),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
    penalty=st.sampled_from([1.0, 1.7, 0.6]),
    data=st.data(),
)
def test_filters_equal_brute_force(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, data: st.DataObject
) -> None:
    seen = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    spec = SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    ours = adjusted_log_probs(torch.tensor([logits], dtype=torch.float64), spec, seen=torch.tensor([seen])).exp()
    expected = torch.tensor([brute_force(logits, spec, seen)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def draw(logits: Tensor, spec: SamplingSpec, *, rows: Tensor, seed: int = 0, place: int = 0) -> Tensor:
    return sample_tokens(logits, spec, random_numbers(seed, rows, place + 1)[:, place])


@pytest.mark.parametrize(
    "spec",
    [
        SamplingSpec(),
        SamplingSpec(temperature=0.5),
        SamplingSpec(temperature=3.0, top_k=20),
        SamplingSpec(top_p=0.8),
        SamplingSpec(min_p=0.1, temperature=1.5),
    ],
    ids=str,
)
def test_samples_follow_the_exact_distribution(spec: SamplingSpec) -> None:
    """Chi-square within 5 standard deviations of its own distribution; the numbers are fixed: no luck is involved."""
    count, vocabulary = 200_000, 50
    logits = 2.0 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1))
    probs = adjusted_log_probs(logits.double(), spec)[0].exp().numpy()
    drawn = draw(logits.expand(count, -1), spec, rows=torch.arange(count)).numpy()
    observed = np.bincount(drawn, minlength=vocabulary)
    assert (observed[probs == 0] == 0).all()
    expected = count * probs[probs > 0]
    pooled = expected >= 5
    chi_square = ((observed[probs > 0] - expected)[pooled] ** 2 / expected[pooled]).sum()
    degrees = pooled.sum() - 1
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


def test_rare_ids_are_not_lost() -> None:
    """32-bit noise would never reach an id of probability 1e-9; the inverse of a 64-bit sum gives it its due part."""
    probs = torch.tensor([[1.0 - 2e-9, 1e-9, 1e-9]], dtype=torch.float64)
    numbers = torch.tensor([0.0, 1 - 2.1e-9, 1 - 1.9e-9, 1 - 1.1e-9, 1 - 0.9e-9, 1 - 2**-53], dtype=torch.float64)
    assert invert_cumulative(probs.expand(6, -1), numbers.unsqueeze(1)).tolist() == [0, 0, 1, 1, 2, 2]


def test_impossible_ids_are_never_taken() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.0]], dtype=torch.float64).expand(4, -1)
    numbers = torch.tensor([[0.0], [2 / 3 - 1e-12], [2 / 3 + 1e-12], [1 - 2**-53]], dtype=torch.float64)
    assert invert_cumulative(probs, numbers).tolist() == [1, 1, 3, 3]


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=20))
def test_the_largest_number_stays_within_the_vocabulary(weights: list[float]) -> None:
    probs = torch.tensor([weights], dtype=torch.float64)
    assert invert_cumulative(probs, torch.tensor([[1 - 2**-53]], dtype=torch.float64)) < len(weights)


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(0))
    chosen = draw(logits, SamplingSpec(temperature=0.0, top_p=0.5, top_k=3), rows=torch.arange(64))
    assert chosen.equal(logits.argmax(dim=-1))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    spec = SamplingSpec(top_p=0.9)
    together = draw(logits, spec, rows=torch.arange(8), seed=7, place=3)
    alone = torch.cat([draw(logits[[i]], spec, rows=torch.tensor([i]), seed=7, place=3) for i in range(8)])
    backwards = draw(logits.flip(0), spec, rows=torch.arange(8).flip(0), seed=7, place=3).flip(0)
    assert together.equal(alone) and together.equal(backwards)


def test_seed_row_and_place_each_change_the_numbers() -> None:
    logits = torch.zeros(100, 1000)
    rows = torch.arange(100)
    first = draw(logits, SamplingSpec(), rows=rows)
    for other in (
        draw(logits, SamplingSpec(), rows=rows, seed=1),
        draw(logits, SamplingSpec(), rows=rows, place=1),
        draw(logits, SamplingSpec(), rows=rows + 100),
    ):
        assert (first == other).float().mean() < 0.05
    assert len(set(first.tolist())) > 80
