"""Counting words and learning merges with the compiled kernels. Loaded by `readiness` when that pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainkit.errors import UserError
from transformerlm.tokenizer.kernels import counting, encoding, learning
from transformerlm.tokenizer.kernels.machine import PADDING
from transformerlm.tokenizer.kernels.pairs import LENGTH, MERGES, PAIRS, enter_all
from transformerlm.tokenizer.segments import (
    PATTERN_NUMBERS,
    Region,
    SpecialTable,
    View,
    between,
    class_table,
    cut_segments,
    group_segments,
    join,
    joined,
    readable,
)
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.specs import PatternName
from transformerlm.tokenizer.vocabulary import Merge

Array: TypeAlias = NDArray[Any]

PART = 1 << 21
"""Bytes that a thread counts at a time."""
MERGES_AT_A_TIME = 64
MOST_BYTES = (1 << 31) - 1
"""Nodes are numbered with 32 bits."""


class WordTable:
    """How often each word occurs."""

    def __init__(self, pattern: PatternName = "gpt2") -> None:
        self._pattern = PATTERN_NUMBERS[pattern]
        self.slots = np.zeros((1 << 15, 4), np.uint64)
        self.arena = np.empty(1 << 16, np.uint8)
        self.used = np.zeros(2, np.int64)

    def __len__(self) -> int:
        return int(self.used[encoding.SLOTS_USED])

    def count(self, region: Region, weights: Array | None = None) -> WordTable:
        """Add the words of the region, those of segment i `weights[i]` times."""
        segments = region.segments
        if weights is None:
            weights = np.ones(len(segments), np.int64)
        if len(segments):
            progress = np.array([0, segments[0, 0]], np.int64)
            self._until_done(
                lambda: counting.count_words(
                    region.address,
                    segments,
                    self._pattern,
                    weights,
                    class_table(),
                    self.slots,
                    self.arena,
                    self.used,
                    progress,
                ),
                most_bytes=int((segments[:, 1] - segments[:, 0]).max()),
            )
        return self

    def add(self, other: WordTable, smallest: int = 0) -> None:
        """Add the words that `other` has at least `smallest` times."""
        progress = np.zeros(1, np.int64)
        self._until_done(
            lambda: counting.add_counts(
                other.slots, other.arena.ctypes.data, smallest, self.slots, self.arena, self.used, progress
            ),
            most_bytes=len(other.arena),
        )

    def nodes(self) -> tuple[Array, Array]:
        """The words as `learning.py` takes them: nodes `int32 [bytes, 4]` and counts `int64 [words]`."""
        total = int(counting.total_length(self.slots))
        if total > MOST_BYTES:
            raise UserError(
                f"the distinct words of the corpus have {total / 1e9:.1f} GB together, more than training can number; "
                "keep fewer of them with max_words"
            )
        nodes = np.empty((total, 4), np.int32)
        counts = np.empty(len(self), np.int64)
        counting.write_nodes(self.slots, self.arena.ctypes.data, nodes, counts)
        return nodes, counts

    def counts(self) -> Array:
        return self.slots[self.slots[:, 1] != 0, 3].astype(np.int64)

    def _until_done(self, call: Callable[[], int], most_bytes: int) -> None:
        """Give the kernel the room that it comes back for; no word has more than `most_bytes`."""
        while status := call():
            if status == encoding.NEEDS_SLOTS:
                larger = np.zeros((2 * len(self.slots), 4), np.uint64)
                encoding.rehash(self.slots, larger)
                self.slots = larger
            else:
                self.arena = _grown(self.arena, 2 * len(self.arena) + most_bytes)


class WordCounter:
    """Counts texts as they come; several threads share each lot of them."""

    def __init__(self, special: SpecialTokens, threads: int, pattern: PatternName = "gpt2") -> None:
        self.table = WordTable(pattern)
        self._pattern: PatternName = pattern
        self._special = SpecialTable(special)
        self._threads = threads

    def __len__(self) -> int:
        return len(self.table)

    def count(self, texts: Sequence[str | bytes]) -> None:
        source, segments = joined(texts)
        if len(self._special.find(source)):
            segments = np.concatenate([self._without_special(source, segment) for segment in segments.tolist()])
        if self._threads == 1 or source.size <= PART:
            for region in readable(source, segments):
                self.table.count(region)
            return
        segments, _ = cut_segments(source, segments, PART)
        regions = [region for part in group_segments(segments, PART) for region in readable(source, part)]
        with ThreadPoolExecutor(self._threads) as pool:
            for table in pool.map(lambda region: WordTable(self._pattern).count(region), regions):
                self.table.add(table)

    def count_words(self, words: Mapping[bytes, int]) -> None:
        """Add words that have been counted already."""
        source, segments = join(list(words), padding=PADDING)
        weights = np.array(list(words.values()), np.int64)
        self.table.count(Region(source.owner, source.address, segments), weights)

    def drop_rare(self, most: int) -> int:
        """Drop the rarest words, all of one count or none, until at most `most` are left; returns their occurrences."""
        counts = self.table.counts()
        place = len(counts) - most - 1
        smallest = int(np.partition(counts, place)[place]) + 1 if place >= 0 else 0
        kept = WordTable(self._pattern)
        kept.add(self.table, smallest)
        self.table = kept
        return int(counts[counts < smallest].sum())

    def _without_special(self, source: View, segment: list[int]) -> Array:
        begin, end = segment
        matches = self._special.find(View(source.owner, source.address + begin, end - begin))
        return between(matches, end - begin) + begin


def learn_merges(nodes: Array, counts: Array, num_merges: int, progress: Callable[[str, int], None]) -> list[Merge]:
    """As `trainer.learn_merges`, from what `WordTable.nodes` returns; `nodes` is used up."""
    total = len(nodes)
    pairs = np.empty((1 << 17, 4), np.int64)
    index = np.full(1 << 18, -1, np.int32)
    places = np.empty(total, np.int32)
    state = np.zeros(4, np.int64)
    learning.start(nodes, counts, pairs, index, places, state)
    tokens = 256 + num_merges
    texts = np.empty(1 << 16, np.uint8)
    texts[:256] = np.arange(256)
    text_ends = np.empty(tokens + 1, np.int64)
    text_ends[:257] = np.arange(257)
    heap = np.empty((len(pairs), 2), np.int64)
    learning.fill_heap(pairs, heap, state, texts, text_ends)
    log = np.empty((1 << 16, 2), np.int32)
    left_pair = np.full(tokens, -1, np.int32)
    right_pair = np.full(tokens, -1, np.int32)
    merges = np.empty((num_merges, 2), np.int64)
    while state[MERGES] < num_merges:
        until = min(num_merges, int(state[MERGES]) + MERGES_AT_A_TIME)
        status = learning.learn(
            until,
            nodes,
            counts,
            pairs,
            index,
            places,
            heap,
            log,
            left_pair,
            right_pair,
            texts,
            text_ends,
            merges,
            state,
        )
        if status == learning.NEEDS_PAIRS:
            pairs, heap = _grown(pairs, 2 * len(pairs)), _grown(heap, 2 * len(heap))
            index = np.full(2 * len(index), -1, np.int32)
            enter_all(pairs, index, state)
        elif status == learning.NEEDS_PLACES:
            longest = int(pairs[: state[PAIRS], LENGTH].max())
            places = _grown(places, len(places) * 3 // 2 + 2 * longest)
        elif status == learning.NEEDS_TEXTS:
            longest = int(np.diff(text_ends[: 257 + state[MERGES]]).max())
            texts = _grown(texts, 2 * len(texts) + 2 * longest)
        elif status == learning.NEEDS_LOG:
            log = np.empty((2 * len(log), 2), np.int32)
        else:
            progress("merge", int(state[MERGES]))
            if state[MERGES] < until:
                break  # no pair is left
    learned = merges[: state[MERGES]].tolist()
    data = texts.tobytes()
    ends = text_ends.tolist()
    token_texts = [data[ends[number] : ends[number + 1]] for number in range(256 + len(learned))]
    return [(token_texts[left], token_texts[right]) for left, right in learned]


def _grown(array: Array, size: int) -> Array:
    larger = np.empty((size, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def warm_up() -> None:
    """Compile every kernel, by using it."""
    counter = WordCounter(SpecialTokens({"<|a|>": 0}, frozenset()), 1)
    counter.count(["one <|a|> two"])
    counter.drop_rare(3)
    learn_merges(*counter.table.nodes(), 2, lambda stage, done: None)
    table = WordTable()
    table._until_done(iter([encoding.NEEDS_SLOTS, encoding.DONE]).__next__, 0)
    enter_all(np.zeros((1, 4), np.int64), np.full(2, -1, np.int32), np.zeros(4, np.int64))
