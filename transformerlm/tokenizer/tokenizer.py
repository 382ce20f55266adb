"""The tokenizer: text or bytes to ids and back.

Special tokens are found first and taken whole; what lies between is cut into pre-tokens, and each pre-token is merged
by itself. Text repeats its words, so the ids of a pre-token are remembered: most of the work is one look-up a word.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainkit.artifacts import publish_directory
from trainkit.errors import UserError
from transformerlm.tokenizer import files
from transformerlm.tokenizer.bpe import MergeTable, merge
from transformerlm.tokenizer.pretokenizer import as_text, pretokenize, to_bytes
from transformerlm.tokenizer.special_tokens import split_special
from transformerlm.tokenizer.specs import END_OF_TEXT, MASK, PAD
from transformerlm.tokenizer.unicode_classes import UNICODE_VERSION
from transformerlm.tokenizer.vocabulary import BYTES, Vocabulary, check_vocabulary

AllowedSpecial: TypeAlias = Literal["all", "none"] | Collection[str]
"""Which special tokens are recognised in text; others are encoded as the plain characters they are written with."""

Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]


class Tokenizer:
    """A byte-level BPE tokenizer; immutable.

    Make one with `Tokenizer.load`, `Tokenizer.from_files` or `transformerlm.tokenizer.trainer.train_tokenizer`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
        self._bytes_of_id = _bytes_of_id(vocabulary)
        self._is_used = np.array([bool(token) for token in self._bytes_of_id])
        self._words = _WordCache(vocabulary)
        self._special_names = frozenset(vocabulary.special_tokens)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer directory (ours, or one with GPT-2's files or a `tokenizer.json`) or a `tokenizer.json`.

        Raises `UserError` when something is missing, damaged or does not fit together.
        """
        return cls(files.read_vocabulary(path))

    @classmethod
    def from_files(cls, vocab: Path | str, merges: Path | str, special_tokens: Path | str | None = None) -> Tokenizer:
        """Read GPT-2's `vocab.json` and `merges.txt` under any names, and a list of special tokens if there is one."""
        return cls(files.read_gpt2_files(vocab, merges, special_tokens))

    def save(self, directory: Path | str, *, replace: bool = False, about: Mapping[str, Any] | None = None) -> None:
        """Publish the tokenizer as `directory`, whole or not at all; `about` (JSON-able) is kept in its manifest."""
        extra = {
            "kind": "tokenizer",
            "content_hash": self.content_hash,
            "vocab_size": self.vocab_size,
            "unicode_version": UNICODE_VERSION,
            **(about or {}),
        }
        with publish_directory(directory, replace=replace, extra=extra) as temporary:
            files.write_vocabulary(self.vocabulary, temporary)

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        return len(self._bytes_of_id)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Id of each special token."""
        return dict(self.vocabulary.special_tokens)

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`, which ends a document; `UserError` if there is none, and so for the next two."""
        return self._special_id(END_OF_TEXT)

    @property
    def pad_id(self) -> int:
        """Id of `<|pad|>`."""
        return self._special_id(PAD)

    @property
    def mask_id(self) -> int:
        """Id of `<|mask|>`."""
        return self._special_id(MASK)

    @property
    def content_hash(self) -> str:
        """SHA-256 of all that decides ids; two tokenizers with the same hash are the same."""
        return self.vocabulary.content_hash()

    def with_special_tokens(self, names: Iterable[str]) -> Tokenizer:
        """This tokenizer with the missing ones of `names` appended; no id changes."""
        vocabulary = self.vocabulary.with_special_tokens(names)
        check_vocabulary(vocabulary, "special tokens")
        return Tokenizer(vocabulary)

    def byte_lengths(self) -> NDArray[np.int64]:
        """`int64 [vocab_size]`: how many bytes of text an id stands for; 0 for special tokens and unused ids.

        Summed over the ids of a text this is its length in UTF-8, special tokens aside: it makes bits per byte exact.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.vocabulary.tokens.items():
            lengths[token_id] = len(token)
        return lengths

    def encode(self, text: str | bytes, *, allowed_special: AllowedSpecial = "all") -> Ids:
        """The ids of `text`: `uint16 [n]`, or `uint32 [n]` where the vocabulary needs it.

        Any bytes are accepted and come back from `decode_bytes`. Text from strangers should be encoded with
        `allowed_special="none"`, else it can end the document.
        """
        return np.fromiter(self._iterate_ids(text, allowed_special), dtype=self.dtype)

    def encode_batch(self, texts: Iterable[str | bytes], *, allowed_special: AllowedSpecial = "all") -> list[Ids]:
        """The ids of each text."""
        return list(self.encode_iterable(texts, allowed_special=allowed_special))

    def encode_iterable(
        self, texts: Iterable[str | bytes], *, allowed_special: AllowedSpecial = "all"
    ) -> Iterator[Ids]:
        """Yield the ids of each text as it comes; holds one text at a time."""
        return (self.encode(text, allowed_special=allowed_special) for text in texts)

    def count(self, text: str | bytes, *, allowed_special: AllowedSpecial = "all") -> int:
        """How many ids `text` has, in constant memory."""
        return sum(1 for _ in self._iterate_ids(text, allowed_special))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes that `ids` (integers, one dimension) stand for; special tokens as they are written."""
        return b"".join(map(self._bytes_of_id.__getitem__, self._checked(ids)))

    def decode(self, ids: ArrayLike, errors: str = "replace") -> str:
        """The text that `ids` stand for; `errors` as in `bytes.decode`, for ids that do not make valid UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_stream(self, ids: Iterable[int], errors: str = "replace") -> Iterator[str]:
        """Yield text as ids arrive, never half a character; joined it is `decode` of all ids."""
        decoder = self.incremental_decoder(errors)
        for token_id in ids:
            if text := decoder.push(token_id):
                yield text
        if text := decoder.finish():
            yield text

    def incremental_decoder(self, errors: str = "replace") -> IncrementalDecoder:
        return IncrementalDecoder(self, errors)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Vocabulary]]:
        return Tokenizer, (self.vocabulary,)  # worker processes get the vocabulary, not the remembered words

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"

    def _iterate_ids(self, text: str | bytes, allowed_special: AllowedSpecial) -> Iterator[int]:
        return chain.from_iterable(self._iterate_runs(as_text(text), self._names(allowed_special)))

    def _iterate_runs(self, text: str, special_names: frozenset[str]) -> Iterator[Iterable[int]]:
        for start, end, special in split_special(text, special_names):
            for words in pretokenize(text, start, end):
                yield chain.from_iterable(map(self._words.__getitem__, words))
            if special:
                yield (self.vocabulary.special_tokens[special],)

    def _names(self, allowed: AllowedSpecial) -> frozenset[str]:
        if isinstance(allowed, str):
            if allowed not in ("all", "none"):
                raise UserError(f"allowed_special is {allowed!r}; it must be 'all', 'none' or a set of special tokens")
            return self._special_names if allowed == "all" else frozenset()
        if unknown := sorted(set(allowed) - self._special_names):
            known = ", ".join(self.vocabulary.special_tokens) or "none"
            raise UserError(f"{unknown[0]!r} is not a special token; known are {known}")
        return frozenset(allowed)

    def _special_id(self, name: str) -> int:
        if name not in self.vocabulary.special_tokens:
            raise UserError(f"the tokenizer has no {name} token; add it with with_special_tokens, or train it with one")
        return self.vocabulary.special_tokens[name]

    def _checked(self, ids: ArrayLike) -> list[int]:
        array = np.asarray(ids)
        if array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise UserError(f"ids to decode must be one row of integers, not {array.dtype} of shape {array.shape}")
        # A negative index would silently count from the end.
        outside = array[(array < 0) | (array >= self.vocab_size)]
        unknown = outside if outside.size else array[~self._is_used[array]]
        if unknown.size:
            raise UserError(f"the id {unknown[0]} is not in the vocabulary, whose ids are below {self.vocab_size}")
        return array.tolist()


class IncrementalDecoder:
    """Turns ids into text one at a time and holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, errors: str = "replace") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, often one word, possibly none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left at the end: the replacement of an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


class _WordCache(dict[str, tuple[int, ...]]):
    """Pre-token to ids: filled by merging on a miss, emptied when it is full."""

    LARGEST_SIZE = 1 << 18
    LONGEST_WORD = 64
    """Longer pre-tokens hardly ever repeat, and would make the memory of a full cache depend on the text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._id_of_byte = [vocabulary.tokens[token] for token in BYTES]
        self._merges = _merge_table(vocabulary)

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(merge([self._id_of_byte[value] for value in to_bytes(word)], self._merges))
        if len(word) <= self.LONGEST_WORD:
            if len(self) >= self.LARGEST_SIZE:
                self.clear()
            self[word] = ids
        return ids


def _merge_table(vocabulary: Vocabulary) -> MergeTable:
    ids = vocabulary.tokens
    return {(ids[left], ids[right]): (rank, ids[left + right]) for rank, (left, right) in enumerate(vocabulary.merges)}


def _bytes_of_id(vocabulary: Vocabulary) -> list[bytes]:
    """What each id decodes to; empty for an unused id."""
    table = [b""] * vocabulary.size
    for token, token_id in vocabulary.tokens.items():
        table[token_id] = token
    for name, token_id in vocabulary.special_tokens.items():
        table[token_id] = name.encode()
    return table
