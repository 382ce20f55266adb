"""What a 5-gram pays on the stories: they must be hard for a model that forgets after four words."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from transformerlm.corpus.stories import entropy, log_prob, sample, split_seed

ORDER = 5
BITS = 12  # of a word's id: five of them fit into an int64
NUM_TRAIN, NUM_TEST = 20_000, 500


def test_an_interpolated_5_gram_is_far_above_the_entropy() -> None:
    ids: dict[str, int] = {}
    train = encode([sample(split_seed(0, "train"), i) for i in range(NUM_TRAIN)], ids)
    held_out = [sample(split_seed(0, "val"), i) for i in range(NUM_TEST)]
    test = encode(held_out, ids)
    assert len(ids) < 1 << BITS

    # The best of several discounts, chosen on the test set itself: the n-gram gets every advantage.
    losses = -np.log(kneser_ney(train, test, len(ids), discounts=np.array([0.5, 0.7, 0.8, 0.9]))).sum(axis=1) / NUM_TEST
    truth = -sum(map(log_prob, held_out)) / NUM_TEST

    assert truth == pytest.approx(entropy(), rel=0.02)
    assert losses.min() > 1.4 * truth


def test_the_5_gram_is_a_distribution() -> None:
    ids: dict[str, int] = {}
    train = encode([sample(0, i) for i in range(50)], ids)
    history = train[np.array([4, 1000]), :-1].repeat(len(ids), axis=0)
    every_word = np.tile(np.arange(len(ids)), 2)[:, None]
    probability = kneser_ney(train, np.hstack([history, every_word]), len(ids), discounts=np.array([0.5, 0.9]))
    np.testing.assert_allclose(probability.reshape(4, -1).sum(axis=1), 1)


def encode(stories: list[str], ids: dict[str, int]) -> np.ndarray:
    """Windows of five word ids, int64 [positions, 5]. A word keeps the space before it, so that no text is free."""
    pad = ids.setdefault("<pad>", 0)
    windows: list[np.ndarray] = []
    for story in stories:
        words = [*re.findall(r"\s*(?:\w+|[^\w\s])", story), "<end>"]
        row = np.array([pad] * (ORDER - 1) + [ids.setdefault(word, len(ids)) for word in words], dtype=np.int64)
        windows.append(np.lib.stride_tricks.sliding_window_view(row, ORDER))
    return np.concatenate(windows)


@dataclass(frozen=True)
class Table:
    """Sorted distinct keys and a number for each."""

    keys: np.ndarray
    numbers: np.ndarray

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.numbers[at], 0)


def kneser_ney(train: np.ndarray, test: np.ndarray, num_words: int, discounts: np.ndarray) -> np.ndarray:
    """Interpolated Kneser-Ney probabilities, float64 [discounts, test positions] (Chen & Goodman 1998, section 2.7)."""
    # The highest order counts occurrences; each lower one counts the distinct words that precede its n-grams.
    tables = [Table(*np.unique(pack(train), return_counts=True))]
    for order in range(ORDER - 1, 0, -1):
        tables.append(Table(*np.unique(suffix(tables[-1].keys, order), return_counts=True)))

    probability = np.full((len(discounts), len(test)), 1 / num_words)
    for order, count in enumerate(reversed(tables), start=1):
        contexts, first, kinds = np.unique(count.keys >> BITS, return_index=True, return_counts=True)
        total = Table(contexts, np.add.reduceat(count.numbers, first))
        key = suffix(pack(test), order)
        seen, different = total(key >> BITS), Table(contexts, kinds)(key >> BITS)
        discounted = np.maximum(count(key) - discounts[:, None], 0) + discounts[:, None] * different * probability
        probability = np.where(seen > 0, discounted / np.maximum(seen, 1), probability)
    return probability


def pack(grams: np.ndarray) -> np.ndarray:
    """One integer per n-gram, its last word in the low bits."""
    return (grams << BITS * np.arange(grams.shape[1] - 1, -1, -1)).sum(axis=1)


def suffix(packed: np.ndarray, order: int) -> np.ndarray:
    """The last `order` words of packed n-grams."""
    return packed & ((1 << BITS * order) - 1)
