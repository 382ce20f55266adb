"""Encoding and decoding with the compiled kernels. Loaded by `transformerlm.tokenizer.readiness` when that pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainkit.errors import UserError
from transformerlm.tokenizer.kernels import decoding, encoding, merging
from transformerlm.tokenizer.kernels.machine import ALL_BITS, PADDING
from transformerlm.tokenizer.kernels.merging import Merges
from transformerlm.tokenizer.segments import (
    PATTERN_NUMBERS,
    Region,
    SpecialTable,
    View,
    between,
    class_table,
    cut_segments,
    group_segments,
    joined,
    readable,
    view,
)
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.vocabulary import BYTES, Vocabulary, trained_vocabulary

Array: TypeAlias = NDArray[Any]

FIRST_SLOTS = 1 << 13
MOST_SLOTS = 1 << 21
"""64 MB, for a million pre-tokens; a full table is emptied."""
FIRST_ARENA = 1 << 16
MOST_ARENA = 1 << 26

SMALLEST_PART = 1 << 17
"""Bytes below which a part is not worth a thread."""
PARTS_PER_THREAD = 4
"""So that a thread which was held up does not hold up all."""


def merge_tables(vocabulary: Vocabulary) -> Merges:
    numbers = {token: number for number, token in enumerate(BYTES)}
    made = [numbers.setdefault(left + right, len(numbers)) for left, right in vocabulary.merges]
    if len(numbers) > merging.MAX_TOKENS:
        raise UserError(
            f"the tokenizer has {len(numbers):,} tokens, of which {merging.MAX_TOKENS:,} can be told apart while "
            "encoding; train one with a smaller tokenizer.vocab_size"
        )
    lefts = np.array([numbers[left] for left, _ in vocabulary.merges], np.int64)
    rights = np.array([numbers[right] for _, right in vocabulary.merges], np.int64)
    capacity = 1 << max(10, (4 * len(lefts)).bit_length() - 1)
    pairs = np.full(capacity, ALL_BITS, np.uint64)
    merging.fill_pairs(lefts, rights, pairs)
    byte_pairs = np.full(1 << 16, merging.NO_MERGE, np.int32)
    ranks = np.arange(len(lefts), dtype=np.int32)
    of_bytes = (lefts < 256) & (rights < 256)
    byte_pairs[(lefts << 8 | rights)[of_bytes]] = ranks[of_bytes]
    ids = np.fromiter(map(vocabulary.tokens.__getitem__, numbers), np.int64, len(numbers))
    return Merges(byte_pairs, pairs, np.array(made, np.int32), ids)


class WordCache:
    """The ids of the pre-tokens seen; one thread at a time."""

    def __init__(self) -> None:
        self.slots = np.zeros((FIRST_SLOTS, 4), np.uint64)
        self.arena = np.empty(FIRST_ARENA, np.uint8)
        self.used = np.zeros(2, np.int64)

    def table(self) -> encoding.Words:
        return encoding.Words(self.slots, self.arena, self.used)

    def make_room(self, status: int) -> None:
        """Give the kernel what it came back for: more room, or in a cache of the largest size an empty one."""
        if status == encoding.NEEDS_SLOTS and len(self.slots) < MOST_SLOTS:
            larger = np.zeros((4 * len(self.slots), 4), np.uint64)
            encoding.rehash(self.slots, larger)
            self.slots = larger
        elif status == encoding.NEEDS_ARENA and len(self.arena) < MOST_ARENA:
            self.arena = np.concatenate([self.arena, np.empty(3 * len(self.arena), np.uint8)])
        else:
            self.slots[:] = 0
            self.used[:] = 0


class CompiledEncoder:
    """Any number of threads may use one at the same time."""

    def __init__(self, vocabulary: Vocabulary, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._merges = merge_tables(vocabulary)
        self._classes = class_table()
        self._pattern = PATTERN_NUMBERS[vocabulary.pattern]
        self._caches: list[WordCache] = []  # those that no call is using; `append` and `pop` are atomic
        self._special: dict[tuple[frozenset[str], frozenset[str]], SpecialTable] = {}

    def encode(self, text: str | bytes, special: SpecialTokens, threads: int) -> Array:
        """The ids of `text`."""
        source = view(text)
        table = self._table(special)
        matches = table.find(source)
        ids, ends = self._encode_segments(source, between(matches, source.size), threads)
        return np.insert(ids, ends[:-1], table.ids[matches[:, 2]].astype(self._dtype)) if len(matches) else ids

    def encode_batch(self, texts: Sequence[str | bytes], special: SpecialTokens, threads: int) -> list[Array]:
        """The ids of each text; their UTF-8 is held in memory once more."""
        source, segments = joined(texts)
        table = self._table(special)
        if not len(table.find(source)):
            ids, ends = self._encode_segments(source, segments, threads)
            return _pieces(ids, ends)
        found = [
            np.add(table.find(View(source.owner, source.address + begin, end - begin)), [begin, begin, 0])
            for begin, end in segments.tolist()
        ]
        counts = np.array([len(matches) for matches in found], np.int64)
        matches = np.concatenate(found)
        starts = np.sort(np.concatenate([segments[:, 0], matches[:, 1]]))
        stops = np.sort(np.concatenate([segments[:, 1], matches[:, 0]]))
        ids, ends = self._encode_segments(source, np.stack([starts, stops], axis=1), threads)
        # A text with k special tokens has k + 1 segments; a special token follows each of them but the last.
        last = np.cumsum(counts + 1) - 1
        is_inner = np.ones(len(ends), bool)
        is_inner[last] = False
        with_special = np.insert(ids, ends[is_inner], table.ids[matches[:, 2]].astype(self._dtype))
        return _pieces(with_special, ends[last] + np.cumsum(counts))

    def _table(self, special: SpecialTokens) -> SpecialTable:
        key = (special.names, special.forbidden)
        if key not in self._special:
            self._special[key] = SpecialTable(special)
        return self._special[key]

    def _encode_segments(self, source: View, segments: Array, threads: int) -> tuple[Array, Array]:
        """The ids of all segments, and where among them those of each end."""
        if threads > 1 and source.size >= 2 * SMALLEST_PART:
            part_size = max(SMALLEST_PART, source.size // (threads * PARTS_PER_THREAD))
            finer, origin = cut_segments(source, segments, part_size)
            parts = group_segments(finer, part_size)
            with ThreadPoolExecutor(threads) as pool:
                encoded = list(pool.map(lambda part: self._encode_part(source, part), parts))
            ids = np.concatenate([ids for ids, _ in encoded])
            offsets = np.cumsum([0, *(len(ids) for ids, _ in encoded[:-1])])
            ends = np.concatenate([ends + offset for (_, ends), offset in zip(encoded, offsets, strict=True)])
            is_last = np.append(origin[1:] != origin[:-1], True)
            return ids, ends[is_last]
        return self._encode_part(source, segments)

    def _encode_part(self, source: View, segments: Array) -> tuple[Array, Array]:
        """In one thread."""
        regions = readable(source, segments)
        if len(regions) == 1:
            return self._run(regions[0])
        (ids, ends), (last_ids, last_ends) = map(self._run, regions)
        uncut = len(segments) - len(last_ends)
        return np.concatenate([ids, last_ids]), np.concatenate([ends[:uncut], last_ends + len(ids)])

    def _run(self, region: Region) -> tuple[Array, Array]:
        """Call the kernel until it is done."""
        segments = region.segments
        total = int((segments[:, 1] - segments[:, 0]).sum())
        margin = encoding.OUTPUT_MARGIN
        output = np.empty((total if total < 1 << 16 else total // 4) + margin, self._dtype)
        progress = np.array([0, segments[0, 0] if len(segments) else 0, 0], np.int64)
        ends = np.empty(len(segments), np.int64)
        try:
            words = self._caches.pop()
        except IndexError:
            words = WordCache()
        while True:
            status = encoding.encode(
                region.address, segments, self._pattern, self._classes, self._merges, words.table(),
                output.ctypes.data, len(output), output.itemsize, progress, ends,
            )  # fmt: skip
            if status == encoding.DONE:
                break
            if status == encoding.NEEDS_OUTPUT:
                output = _larger(output, int(progress[2]), _consumed(segments, progress), total)
            else:
                words.make_room(status)
        self._caches.append(words)
        ids = output[: progress[2]]
        return (ids.copy() if len(output) < 1 << 20 else ids), ends


def _larger(output: Array, used: int, consumed: int, total: int) -> Array:
    """Room for what is to come, if it goes on as so far, and at least half as much again."""
    expected = used + (total - consumed) * (used + 1) / max(consumed, 1) * 1.1
    size = min(max(int(expected), len(output) * 3 // 2), total) + (1 << 13)
    larger = np.empty(max(size, len(output) + (1 << 16)), output.dtype)
    larger[:used] = output[:used]
    return larger


def _consumed(segments: Array, progress: Array) -> int:
    number, place = int(progress[0]), int(progress[1])
    whole = segments[:number]
    return int((whole[:, 1] - whole[:, 0]).sum()) + place - int(segments[number, 0])


def _pieces(ids: Array, ends: Array) -> list[Array]:
    starts = [0, *ends.tolist()]
    return [ids[begin:end] for begin, end in pairwise(starts)]


class CompiledDecoder:
    def __init__(self, bytes_of_id: Iterable[bytes]) -> None:
        tokens = list(bytes_of_id)
        self._ends = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        self._texts = np.frombuffer(b"".join(tokens) + bytes(PADDING), np.uint8)

    def decode(self, ids: Array) -> bytes | None:
        """The bytes of `ids`; `None` if the vocabulary lacks one of them."""
        ids = ids.astype(np.int64, copy=False)
        size = decoding.decoded_size(ids, self._ends)
        if size < 0:
            return None
        target = np.empty(size + PADDING, np.uint8)
        decoding.decode(ids, self._ends, self._texts.ctypes.data, target.ctypes.data)
        return target[:size].tobytes()


def warm_up() -> None:
    """Compile every kernel, by using it."""
    vocabulary = trained_vocabulary([(b"a", b"b")], ["<|a|>"])
    for dtype in (np.dtype(np.uint16), np.dtype(np.uint32)):
        encoder = CompiledEncoder(vocabulary, dtype)
        ids = encoder.encode(b"ab <|a|>" * 100, SpecialTokens({"<|a|>": 257}, frozenset()), 1)
        CompiledDecoder([b"a"] * vocabulary.size).decode(ids)
    encoding.rehash(np.zeros((8, 4), np.uint64), np.zeros((16, 4), np.uint64))
