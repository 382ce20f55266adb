"""From the documents of a lane to windows of `length` + 1 tokens, in three ways.

In every window the first token is only looked at, never predicted: the end-of-text token before a document, or, where
a document was cut, the token before the cut. So each token of a document, and the end-of-text token that ends it, is a
target exactly once.

- `concatenate`: documents one after the other, cut where a window ends.
- `best_fit`: the next documents of the lane are packed together by best-fit decreasing, so that those that fit into a
  window stay whole (arXiv:2404.10830). Longer ones are cut into full windows and a rest.
- `rows`: one document a window, cut to it.

What is left of a window is fill: end-of-text tokens of document -1.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainkit.data.document_order import Place
from trainkit.random import Purpose, derive_seed, permute

Int64Array = npt.NDArray[np.int64]

FILL = -1
"""The document of a token that stands for nothing."""


class Document(NamedTuple):
    number: int
    """Its place in the order of the run, on through the epochs."""
    place: Place
    """Of the block that it is in."""
    tokens: npt.NDArray[np.integer[Any]]
    """int [n], the end-of-text token last."""


class Position(NamedTuple):
    """How far a lane has been used."""

    document: int
    """The number of the document from which its windows can be made again."""
    offset: int
    """What is behind: tokens of this document (`concatenate`), else windows that begin with or contain it."""
    place: Place


class Window(NamedTuple):
    tokens: Int64Array
    """[length + 1]."""
    documents: Int64Array
    """[length + 1]: numbers from 0 on, the token that ends a document belonging to it; -1 = fill."""
    after: Position
    """Where the lane goes on behind this window."""


def concatenate(documents: Iterator[Document], offset: int, *, length: int, eot_id: int) -> Iterator[Window]:
    """Windows from token `offset` of the first document on; no token is fill."""
    document = next(documents)
    while True:
        tokens, numbers = np.empty(length + 1, np.int64), np.empty(length + 1, np.int64)
        tokens[0] = document.tokens[offset - 1] if offset else eot_id
        numbers[0] = 0
        filled, number = 1, 0 if offset else 1
        while filled <= length:
            # The next document is not read before it is needed: it may be what cannot be read.
            if offset == len(document.tokens):
                document, offset, number = next(documents), 0, number + 1
            part = document.tokens[offset : offset + length + 1 - filled]
            end = filled + len(part)
            tokens[filled:end] = part
            numbers[filled:end] = number
            filled, offset = end, offset + len(part)
        yield Window(tokens, numbers, Position(document.number, offset, document.place))


def rows(documents: Iterator[Document], offset: int, *, length: int, eot_id: int) -> Iterator[Window]:
    """A window for each document, without the first `offset` ones."""
    for document in islice(documents, offset, None):
        window = _layout([_Piece(None, document.tokens[:length])], length, eot_id)
        yield Window(*window, Position(document.number, 1, document.place))


def best_fit(
    documents: Iterator[Document], offset: int, *, length: int, eot_id: int, group_size: int, seed: int
) -> Iterator[Window]:
    """The windows of groups of `group_size` documents, without the first `offset` ones of the first group.

    The windows of a group come in an order keyed by `seed`: sorted by length they would be a curriculum.
    """
    while True:
        group = list(islice(documents, group_size))
        first = group[0]
        pieces = [piece for document in group for piece in _cut(document.tokens, length)]
        bins = pack_best_fit([piece.size(length) for piece in pieces], length)
        key = derive_seed(seed, f"windows/{first.number}")
        order: list[int] = permute(np.arange(len(bins)), len(bins), key, Purpose.DATA_ORDER).tolist()
        for emitted in range(offset, len(bins)):
            window = _layout([pieces[i] for i in sorted(bins[order[emitted]])], length, eot_id)
            yield Window(*window, Position(first.number, emitted + 1, first.place))
        offset = 0


def pack_best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of the indices of `sizes` (each 1 … capacity): the largest first, each into the fullest bin that has room.

    Takes n log n comparisons, and for many sizes at most 11/9 of the fewest possible bins (Johnson 1973).
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted: what is left of each bin that is not full, and the bin
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        at = bisect_left(free, (sizes[index], -1))
        if at < len(free):
            left, chosen = free.pop(at)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left > sizes[index]:
            insort(free, (left - sizes[index], chosen))
    return bins


class _Piece(NamedTuple):
    lead: int | None
    """The token before it where a document was cut; None = it begins a document."""
    tokens: npt.NDArray[np.integer[Any]]

    def size(self, length: int) -> int:
        """Tokens that it takes of a window; a lead may need a place of its own."""
        return min(len(self.tokens) + (self.lead is not None), length)


def _cut(tokens: npt.NDArray[np.integer[Any]], length: int) -> list[_Piece]:
    return [
        _Piece(int(tokens[start - 1]) if start else None, tokens[start : start + length])
        for start in range(0, len(tokens), length)
    ]


def _layout(pieces: list[_Piece], length: int, eot_id: int) -> tuple[Int64Array, Int64Array]:
    """One window. The end of a piece is what comes before a document; before the rest of one stands its own lead."""
    tokens, numbers = np.full(length + 1, eot_id, np.int64), np.full(length + 1, FILL, np.int64)
    numbers[0] = 0
    filled, number = 1, 0
    for piece in pieces:
        if piece.lead is None:
            number += 1
        elif filled == 1:
            tokens[0] = piece.lead
        else:
            # Looked at, and no target: whoever predicts it from the document before would learn nothing of the text.
            tokens[filled] = piece.lead
            filled, number = filled + 1, number + 1
        end = filled + len(piece.tokens)
        tokens[filled:end] = piece.tokens
        numbers[filled:end] = number
        filled = end
    return tokens, numbers
