"""Encoding in plain Python: for short texts, and to hold the kernels against.

Text repeats its words, so the ids of a pre-token are remembered, as bytes: most of the work is one look-up a word, and
the ids of a text are joined without making a number of each.

A short text needs no pattern if its *pieces* are known, the parts between its spaces. A space that follows something
else than white space always starts a pre-token, whatever comes before and after it (`pretokenizer._cut_pattern`), so
the piece behind it can be encoded by itself and its ids remembered like those of a word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transformerlm.tokenizer.bpe import MergeTable, merge
from transformerlm.tokenizer.pretokenizer import as_text, ends_in_white, pretokenize, to_bytes
from transformerlm.tokenizer.special_tokens import SpecialTokens, split_special
from transformerlm.tokenizer.vocabulary import BYTES, Vocabulary

Ids: TypeAlias = NDArray[Any]

_join = bytearray().join
"""Gives a new `bytearray`, which an array of ids may write into."""


def dtype_of_ids(vocabulary: Vocabulary) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)


class PlainEncoder:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._dtype = dtype_of_ids(vocabulary)
        self._words = _Remembered(self._merged)
        self._ids_of_piece = _Remembered(self._piece).__getitem__
        # Where a special token holds a space, its parts are found in the pieces.
        self._special = {part for name in vocabulary.special_tokens for part in name.split(" ")}
        self._vocabulary = vocabulary
        self._id_of_byte = [vocabulary.tokens[token] for token in BYTES]

    def encode(self, text: str | bytes, special: SpecialTokens) -> Ids:
        return np.frombuffer(bytearray().join(self._runs(as_text(text), special)), self._dtype)

    def encode_short(self, text: str) -> Ids | None:
        """The same for a text without special tokens, piece by piece; `None` if the text is not as simple as that."""
        if "  " in text:
            return None
        pieces = text.split(" ")
        pieces[0] = " " + pieces[0]
        try:
            return np.frombuffer(_join(map(self._ids_of_piece, pieces)), self._dtype)
        except KeyError:
            return None

    def _runs(self, text: str, special: SpecialTokens) -> Iterator[bytes]:
        for start, end, name in split_special(text, special.names):
            for words in pretokenize(text, start, end, self._vocabulary.pattern):
                yield b"".join(map(self._words.__getitem__, words))
            if name:
                special.check_allowed(name)
                yield self._as_bytes((special.ids[name],))

    def _piece(self, piece: str) -> bytes:
        """The ids of a piece and the space before it, or if a space marks it as the first one, of what follows that.

        `KeyError` if they depend on what surrounds it.
        """
        text = piece[1:] if piece.startswith(" ") else " " + piece
        is_cut_safely = text in ("", " ") or not ends_in_white(text)  # nothing: the text ends with a space, or begins
        if not is_cut_safely or as_text(piece) != piece or any(part in piece for part in self._special):
            raise KeyError(piece)
        words = chain.from_iterable(pretokenize(text, pattern=self._vocabulary.pattern))
        return b"".join(map(self._words.__getitem__, words))

    @cached_property
    def _merges(self) -> MergeTable:  # not needed where all texts are long enough for the kernels
        ids = self._vocabulary.tokens
        merges = enumerate(self._vocabulary.merges)
        return {(ids[left], ids[right]): (rank, ids[left + right]) for rank, (left, right) in merges}

    def _merged(self, word: str) -> bytes:
        return self._as_bytes(merge([self._id_of_byte[value] for value in to_bytes(word)], self._merges))

    def _as_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(number.to_bytes(self._dtype.itemsize, sys.byteorder) for number in ids)


class _Remembered(dict[str, bytes]):
    """Values of a function, made on a miss; emptied when full."""

    LARGEST_SIZE = 1 << 17
    LONGEST_WORD = 64
    """Longer pre-tokens hardly ever repeat, and would make the memory of a full cache depend on the text."""

    def __init__(self, function: Callable[[str], bytes]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, word: str) -> bytes:
        ids = self._function(word)
        if len(word) <= self.LONGEST_WORD:
            if len(self) >= self.LARGEST_SIZE:
                self.clear()
            self[word] = ids
        return ids
