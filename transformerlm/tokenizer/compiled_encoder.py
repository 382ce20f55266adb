"""Encoding and decoding with the compiled kernels. Loaded by `transformerlm.tokenizer.readiness` when that pays.

A text is cut into *segments*, which the kernels encode as if each were all there is: what lies between special tokens,
and for several threads the parts of it, cut where a cut changes nothing. Kernels read in place and up to `PADDING`
bytes too far; only what lies at the very end of a text is copied to where that is allowed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transformerlm.tokenizer.kernels import decoding, encoding
from transformerlm.tokenizer.kernels.machine import PADDING
from transformerlm.tokenizer.kernels.scanning import LETTER, NUMBER, WHITE
from transformerlm.tokenizer.kernels.special import find_special
from transformerlm.tokenizer.pretokenizer import as_text, to_bytes
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.streams import last_cut
from transformerlm.tokenizer.unicode_classes import LETTERS, NUMBERS, WHITE_SPACE, parse_ranges
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
CUT_SEARCH = 1 << 16
"""How far back to look for a place to cut."""


@dataclass(frozen=True)
class MergeTables:
    """The merges as the kernels read them. Tokens are numbered: the bytes by value, then what merges make, in order."""

    byte_pairs: Array
    """`int32 [65536]`: rank of the merge of two bytes."""
    pairs: Array
    """`uint64 [capacity]`: hash table of tokens left and right, and rank."""
    made: Array
    """`int32 [merges]`: the token that a merge makes."""
    id_of_token: Array
    """`int64 [tokens]`."""


def merge_tables(vocabulary: Vocabulary) -> MergeTables:
    numbers = {token: number for number, token in enumerate(BYTES)}
    for left, right in vocabulary.merges:
        numbers.setdefault(left + right, len(numbers))
    lefts = np.array([numbers[left] for left, _ in vocabulary.merges], np.int64)
    rights = np.array([numbers[right] for _, right in vocabulary.merges], np.int64)
    capacity = 1 << max(10, (4 * len(lefts)).bit_length() - 1)
    pairs = np.full(capacity, encoding.ALL_BITS, np.uint64)
    encoding.fill_pairs(lefts, rights, pairs)
    byte_pairs = np.full(1 << 16, encoding.NO_MERGE, np.int32)
    ranks = np.arange(len(lefts), dtype=np.int32)
    of_bytes = (lefts < 256) & (rights < 256)
    byte_pairs[(lefts << 8 | rights)[of_bytes]] = ranks[of_bytes]
    made = np.array([numbers[left + right] for left, right in vocabulary.merges], np.int32)
    ids = np.array([vocabulary.tokens[token] for token in numbers], np.int64)
    return MergeTables(byte_pairs, pairs, made, ids)


@cache
def class_table() -> Array:
    """`uint8 [0x110000]`: the classes of each code point."""
    classes = np.zeros(0x110000, np.uint8)
    for table, flag in ((LETTERS, LETTER), (NUMBERS, NUMBER), (WHITE_SPACE, WHITE)):
        for first, last in parse_ranges(table):
            classes[first : last + 1] |= flag
    return classes


class WordCache:
    """The ids of the pre-tokens seen; one thread at a time."""

    def __init__(self) -> None:
        self.slots = np.zeros((FIRST_SLOTS, 4), np.uint64)
        self.arena = np.empty(FIRST_ARENA, np.uint8)
        self.used = np.zeros(2, np.int64)

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


@dataclass(frozen=True)
class View:
    """Bytes in memory, which `owner` keeps there."""

    owner: object
    address: int
    size: int


def view(text: str | bytes) -> View:
    """The UTF-8 of `text`, without a copy where it lies there already."""
    if isinstance(text, str):
        if text.isascii():
            return View(text, _ascii_address(text), len(text))
        text = to_bytes(as_text(text))
    return View(text, np.frombuffer(text, np.uint8).ctypes.data if text else 0, len(text))


_ascii_address: Callable[[str], int] = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(
    ("PyUnicode_AsUTF8", ctypes.pythonapi)
)
"""An ASCII string holds its own UTF-8; this only tells where."""


class CompiledEncoder:
    """Any number of threads may use one at the same time."""

    def __init__(self, vocabulary: Vocabulary, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._tables = merge_tables(vocabulary)
        self._classes = class_table()
        self._caches: list[WordCache] = []  # those that no call is using; `append` and `pop` are atomic
        self._special: dict[tuple[frozenset[str], frozenset[str]], _SpecialTable] = {}

    def encode(self, text: str | bytes, special: SpecialTokens, threads: int) -> Array:
        """The ids of `text`."""
        source = view(text)
        table = self._special_table(special)
        matches = table.find(source)
        starts = np.append(0, matches[:, 1])
        stops = np.append(matches[:, 0], source.size)
        ids, ends = self._encode_segments(source, np.stack([starts, stops], axis=1), threads)
        return np.insert(ids, ends[:-1], table.ids[matches[:, 2]].astype(self._dtype)) if len(matches) else ids

    def encode_batch(self, texts: Sequence[str | bytes], special: SpecialTokens, threads: int) -> list[Array]:
        """The ids of each text; their UTF-8 is held in memory once more."""
        datas = [text if isinstance(text, bytes) else to_bytes(as_text(text)) for text in texts]
        # The byte between two texts continues no character that the first one leaves unfinished.
        source = view(b"\0".join(datas))
        ends = np.cumsum([len(data) + 1 for data in datas], dtype=np.int64) - 1
        segments = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], axis=1)[: len(datas)]
        table = self._special_table(special)
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

    def _special_table(self, special: SpecialTokens) -> _SpecialTable:
        key = (special.names, special.forbidden)
        if key not in self._special:
            self._special[key] = _SpecialTable(special)
        return self._special[key]

    def _encode_segments(self, source: View, segments: Array, threads: int) -> tuple[Array, Array]:
        """The ids of all segments, and where among them those of each end."""
        if threads > 1 and source.size >= 2 * SMALLEST_PART:
            part_size = max(SMALLEST_PART, source.size // (threads * PARTS_PER_THREAD))
            finer, origin = _cut_segments(source, segments, part_size)
            parts = _group_segments(finer, part_size)
            with ThreadPoolExecutor(threads) as pool:
                encoded = list(pool.map(lambda part: self._encode_part(source, part), parts))
            ids = np.concatenate([ids for ids, _ in encoded])
            offsets = np.cumsum([0, *(len(ids) for ids, _ in encoded[:-1])])
            ends = np.concatenate([ends + offset for (_, ends), offset in zip(encoded, offsets, strict=True)])
            is_last = np.append(origin[1:] != origin[:-1], True)
            return ids, ends[is_last]
        return self._encode_part(source, segments)

    def _encode_part(self, source: View, segments: Array) -> tuple[Array, Array]:
        """In one thread: in place what lies far enough from the end, and then a copy of the rest."""
        first = int(np.searchsorted(segments[:, 1], source.size - PADDING, side="right"))
        if first == len(segments):
            return self._run(source.address, segments)
        begin = int(segments[first, 0])
        cut = _safe_cut(source, begin, source.size - PADDING)
        copy_from = begin if cut is None else cut
        copied = np.zeros(source.size - copy_from + PADDING, np.uint8)
        ctypes.memmove(copied.ctypes.data, source.address + copy_from, source.size - copy_from)
        rest = segments[first:] - copy_from
        rest[0, 0] = max(rest[0, 0], 0)
        if copy_from == 0:
            return self._run(copied.ctypes.data, rest)
        body = segments[:first]
        if cut is not None:
            body = np.concatenate([body, [[begin, cut]]])
        ids, ends = self._run(source.address, body)
        last_ids, last_ends = self._run(copied.ctypes.data, rest)
        return np.concatenate([ids, last_ids]), np.concatenate([ends[:first], last_ends + len(ids)])

    def _run(self, address: int, segments: Array) -> tuple[Array, Array]:
        """Call the kernel until it is done; all memory up to `PADDING` bytes after a segment can be read."""
        tables = self._tables
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
                address, segments, self._classes, tables.byte_pairs, tables.pairs, tables.made, tables.id_of_token,
                words.slots, words.arena, words.used, output.ctypes.data, len(output), output.itemsize, progress, ends,
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


class _SpecialTable:
    """Special tokens as the kernel reads them."""

    def __init__(self, special: SpecialTokens) -> None:
        names = sorted(special.ids, key=lambda name: len(name.encode()), reverse=True)
        encoded = [name.encode() for name in names]
        self.ids = np.array([special.ids[name] for name in names], np.int64)
        self._special = special
        self._names = names
        self._is_forbidden = np.array([name in special.forbidden for name in names], bool)
        self._texts = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._first_bytes = np.array(sorted({name[0] for name in encoded}), np.int64)

    def find(self, source: View) -> Array:
        """`int64 [n, 3]`: start, end and number of each special token in the text; `UserError` if one is forbidden."""
        found = [np.empty((0, 3), np.int64)]
        place = 0 if self._names else source.size
        while place < source.size:
            room = np.empty((64 if place == 0 else 4096, 3), np.int64)
            count, place = find_special(
                source.address, source.size, place, self._first_bytes, self._texts, self._ends, room
            )
            found.append(room[:count])
        matches = np.concatenate(found)
        for number in matches[self._is_forbidden[matches[:, 2]], 2] if self._special.forbidden else ():
            self._special.check_allowed(self._names[number])
        return matches


def _safe_cut(source: View, begin: int, end: int) -> int | None:
    """A place in `begin` to `end` where cutting changes no ids, if there is one not far from `end`."""
    nearby = max(begin, end - CUT_SEARCH)
    if nearby >= end:
        return None
    cut = last_cut(ctypes.string_at(source.address + nearby, end - nearby))
    return nearby + cut if cut else None


def _cut_segments(source: View, segments: Array, part_size: int) -> tuple[Array, Array]:
    """The same segments with the long ones cut, and the number of the segment that each comes from."""
    pieces: list[tuple[int, int]] = []
    origin: list[int] = []
    for number, (begin, end) in enumerate(segments.tolist()):
        while end - begin > part_size and (cut := _safe_cut(source, begin, begin + part_size)):
            pieces.append((begin, cut))
            origin.append(number)
            begin = cut
        pieces.append((begin, end))
        origin.append(number)
    return np.array(pieces, np.int64).reshape(-1, 2), np.array(origin, np.int64)


def _group_segments(segments: Array, part_size: int) -> list[Array]:
    """Neighbouring segments in groups of about `part_size` bytes."""
    groups = np.cumsum(segments[:, 1] - segments[:, 0]) // part_size
    return np.split(segments, np.flatnonzero(np.diff(groups)) + 1)


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
