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
    loss = min(kneser_ney(train, test, num_words=len(ids), discount=d) for d in (0.3, 0.5, 0.7, 0.9)) / NUM_TEST
    truth = -sum(map(log_prob, held_out)) / NUM_TEST

    assert truth == pytest.approx(entropy(), rel=0.02)
    assert loss > 1.4 * truth


def encode(stories: list[str], ids: dict[str, int]) -> np.ndarray:
    """Windows of five word ids, int64 [positions, 5]. A word keeps the space before it, so that no text is free of charge."""
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


def kneser_ney(train: np.ndarray, test: np.ndarray, *, num_words: int, discount: float) -> float:
    """Nats of all test positions under interpolated Kneser-Ney (Chen & Goodman 1998, equation 4.23 and below)."""
    probability = np.full(len(test), 1 / num_words)
    for order in range(1, ORDER + 1):
        # The highest order counts occurrences; a lower one counts the distinct words that precede its n-gram.
        grams = pack(train[:, -order:]) if order == ORDER else pack(np.unique(pack(train[:, -order - 1 :])), order)
        count = Table(*np.unique(grams, return_counts=True))
        contexts, first, following = np.unique(count.keys >> BITS, return_index=True, return_counts=True)
        total = Table(contexts, np.add.reduceat(count.numbers, first))
        kinds = Table(contexts, following)

        key = pack(test[:, -order:])
        seen = total(key >> BITS)
        backed_off = discount * kinds(key >> BITS) * probability
        interpolated = (np.maximum(count(key) - discount, 0) + backed_off) / np.maximum(seen, 1)
        probability = np.where(seen > 0, interpolated, probability)
    return float(-np.log(probability).sum())


def pack(grams: np.ndarray, order: int | None = None) -> np.ndarray:
    """One integer per n-gram, its last word in the low bits; of packed n-grams, the last `order` words."""
    if order is not None:
        return grams & ((1 << BITS * order) - 1)
    return (grams << BITS * np.arange(grams.shape[1] - 1, -1, -1)).sum(axis=1)
