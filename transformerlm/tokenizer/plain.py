"""Encoding and decoding in plain Python: for short texts, and to hold the kernels against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain

from transformerlm.tokenizer.bpe import MergeTable, merge
from transformerlm.tokenizer.pretokenizer import as_text, ascii_expression, pretokenize, to_bytes
from transformerlm.tokenizer.special_tokens import SpecialTokens, split_special
from transformerlm.tokenizer.specs import PatternName
from transformerlm.tokenizer.vocabulary import BYTES, Vocabulary


class PlainEncoder:
    """Text repeats its words, so the ids of a pre-token are remembered: most of the work is one look-up a word."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._words = _WordCache(vocabulary)
        self._pattern: PatternName = vocabulary.pattern
        self._ascii = ascii_expression(vocabulary.pattern)

    def encode_short(self, text: str | bytes, special: SpecialTokens) -> list[int]:
        """The same ids as `encode`, with less to set up: for a short ASCII text without special tokens in it."""
        if not isinstance(text, str) or not text.isascii() or any(name in text for name in special.names):
            return list(self.encode(text, special))
        ids: list[int] = []
        words = self._words
        for word in self._ascii.findall(text):
            ids += words[word]
        return ids

    def encode(self, text: str | bytes, special: SpecialTokens) -> Iterator[int]:
        return chain.from_iterable(self._runs(as_text(text), special))

    def _runs(self, text: str, special: SpecialTokens) -> Iterator[Iterable[int]]:
        for start, end, name in split_special(text, special.names):
            for words in pretokenize(text, start, end, self._pattern):
                yield chain.from_iterable(map(self._words.__getitem__, words))
            if name:
                special.check_allowed(name)
                yield (special.ids[name],)


class _WordCache(dict[str, tuple[int, ...]]):
    """Pre-token to ids: filled by merging on a miss, emptied when it is full."""

    LARGEST_SIZE = 1 << 18
    LONGEST_WORD = 64
    """Longer pre-tokens hardly ever repeat, and would make the memory of a full cache depend on the text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._id_of_byte = [vocabulary.tokens[token] for token in BYTES]

    @cached_property
    def _merges(self) -> MergeTable:  # not needed where all texts are long enough for the kernels
        ids = self._vocabulary.tokens
        merges = enumerate(self._vocabulary.merges)
        return {(ids[left], ids[right]): (rank, ids[left + right]) for rank, (left, right) in merges}

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(merge([self._id_of_byte[value] for value in to_bytes(word)], self._merges))
        if len(word) <= self.LONGEST_WORD:
            if len(self) >= self.LARGEST_SIZE:
                self.clear()
            self[word] = ids
        return ids
