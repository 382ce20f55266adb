"""Text as the kernels read it: an address, and segments of what is there.

A *segment* is a pair of offsets. Kernels treat each as if it were all there is: what lies between special tokens, one
of several texts, or a part of a long one, cut where a cut changes nothing. They read in place and up to `PADDING` bytes
too far; only what lies at the very end of a text is copied to where that is allowed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transformerlm.tokenizer.kernels.machine import PADDING
from transformerlm.tokenizer.kernels.patterns import CL100K, GPT2, O200K
from transformerlm.tokenizer.kernels.scanning import LETTER, LOWER, MARK, NUMBER, UPPER, WHITE
from transformerlm.tokenizer.kernels.special import find_special
from transformerlm.tokenizer.pretokenizer import as_text, to_bytes
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.specs import PatternName
from transformerlm.tokenizer.streams import last_cut
from transformerlm.tokenizer.unicode_classes import (
    LETTERS,
    LOWERCASE,
    MARKS,
    NUMBERS,
    UPPERCASE,
    WHITE_SPACE,
    parse_ranges,
)

Array: TypeAlias = NDArray[Any]

PATTERN_NUMBERS: dict[PatternName, int] = {"gpt2": GPT2, "cl100k": CL100K, "o200k": O200K}

CUT_SEARCH = 1 << 16
"""How far back to look for a place to cut."""


@cache
def class_table() -> Array:
    """`uint8 [0x110000]`: the classes of each code point."""
    classes = np.zeros(0x110000, np.uint8)
    flags = ((LETTERS, LETTER), (NUMBERS, NUMBER), (WHITE_SPACE, WHITE))
    for table, flag in (*flags, (UPPERCASE, UPPER), (LOWERCASE, LOWER), (MARKS, MARK)):
        for first, last in parse_ranges(table):
            classes[first : last + 1] |= flag
    return classes


@dataclass(frozen=True)
class View:
    """Bytes in memory, which `owner` keeps there."""

    owner: object
    address: int
    size: int


def view(text: str | bytes) -> View:
    """The UTF-8 of `text`, where it lies already if it does."""
    if isinstance(text, str):
        try:
            size = ctypes.c_ssize_t()
            address = _utf8_of(text, ctypes.byref(size))
            return View(text, address, size.value)
        except UnicodeEncodeError:
            text = to_bytes(as_text(text))
    return View(text, np.frombuffer(text, np.uint8).ctypes.data if text else 0, len(text))


_utf8_of: Callable[..., int] = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)(
    ("PyUnicode_AsUTF8AndSize", ctypes.pythonapi)
)
"""CPython keeps the UTF-8 of a string with it: ASCII is stored so anyway, other text once more from the first call."""


def joined(texts: Sequence[str | bytes]) -> tuple[View, Array]:
    """All texts as one, and a segment for each; one text alone is not copied."""
    if len(texts) == 1:
        source = view(texts[0])
        return source, np.array([[0, source.size]], np.int64)
    return join([text if isinstance(text, bytes) else to_bytes(as_text(text)) for text in texts])


def join(texts: Sequence[bytes], padding: int = 0) -> tuple[View, Array]:
    # The byte between two texts continues no character that the first one leaves unfinished.
    source = view(b"\0".join(texts) + bytes(padding))
    lengths = np.array([len(text) for text in texts], np.int64)
    ends = np.cumsum(lengths + 1) - 1
    return source, np.stack([ends - lengths, ends], axis=1)


@dataclass(frozen=True)
class Region:
    """Segments in memory that can be read up to `PADDING` bytes beyond each of them."""

    owner: object
    address: int
    segments: Array


def readable(source: View, segments: Array) -> list[Region]:
    """The segments in place as far as possible, and a copy of the rest; the last one in place may be cut for that."""
    first = int(np.searchsorted(segments[:, 1], source.size - PADDING, side="right"))
    if first == len(segments):
        return [Region(source.owner, source.address, segments)]
    begin = int(segments[first, 0])
    cut = _safe_cut(source, begin, source.size - PADDING)
    copied_from = cut or begin
    copied = np.zeros(source.size - copied_from + PADDING, np.uint8)
    ctypes.memmove(copied.ctypes.data, source.address + copied_from, source.size - copied_from)
    rest = np.maximum(segments[first:] - copied_from, 0)
    if copied_from == 0:
        return [Region(copied, copied.ctypes.data, rest)]
    in_place = segments[:first]
    if cut:
        in_place = np.append(in_place, [[begin, cut]], axis=0)
    return [Region(source.owner, source.address, in_place), Region(copied, copied.ctypes.data, rest)]


def between(matches: Array, size: int) -> Array:
    """The segments before, between and after `matches`, as `SpecialTable.find` returns them."""
    return np.stack([np.append(0, matches[:, 1]), np.append(matches[:, 0], size)], axis=1)


def _safe_cut(source: View, begin: int, end: int) -> int | None:
    """A place in `begin` to `end` where cutting changes no ids, if there is one not far from `end`."""
    nearby = max(begin, end - CUT_SEARCH)
    if nearby >= end:
        return None
    cut = last_cut(ctypes.string_at(source.address + nearby, end - nearby))
    return nearby + cut if cut else None


def cut_segments(source: View, segments: Array, part_size: int) -> tuple[Array, Array]:
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


def group_segments(segments: Array, part_size: int) -> list[Array]:
    """Neighbouring segments in groups of about `part_size` bytes."""
    groups = np.cumsum(segments[:, 1] - segments[:, 0]) // part_size
    return np.split(segments, np.flatnonzero(np.diff(groups)) + 1)


class SpecialTable:
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
