"""The tokenizer: text or bytes to ids and back.

Special tokens are found first and taken whole; what lies between is cut into pre-tokens, and each pre-token is merged
by itself. There are two ways to the same ids: plain Python for short texts (`plain.py`), and compiled kernels
(`compiled_encoder.py`), which `readiness.py` loads once there is enough to encode.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainkit.artifacts import publish_directory
from trainkit.errors import UserError
from transformerlm.tokenizer import files, readiness
from transformerlm.tokenizer.plain import PlainEncoder, dtype_of_ids
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.specs import END_OF_TEXT, MASK, PAD, PatternName
from transformerlm.tokenizer.streams import batches, file_pieces
from transformerlm.tokenizer.unicode_classes import UNICODE_VERSION
from transformerlm.tokenizer.vocabulary import Vocabulary, check_vocabulary

if TYPE_CHECKING:
    from transformerlm.tokenizer.compiled_encoder import CompiledDecoder, CompiledEncoder

SpecialNames: TypeAlias = Literal["all", "none"] | Collection[str]
"""Which special tokens. Those neither allowed nor disallowed are encoded as the plain characters they consist of."""

Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]

KERNELS = "compiled_encoder"
SHORT_TEXT = 200
"""Characters, or ids, up to which calling a kernel costs more than the plain path."""


class Tokenizer:
    """A byte-level BPE tokenizer; immutable.

    Make one with `Tokenizer.load`, `Tokenizer.from_files` or `transformerlm.tokenizer.trainer.train_tokenizer`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.dtype: np.dtype[Any] = dtype_of_ids(vocabulary)
        self._bytes_of_id = _bytes_of_id(vocabulary)
        self._is_used = np.array([bool(token) for token in self._bytes_of_id])
        self._plain = PlainEncoder(vocabulary)
        self._special_names = frozenset(vocabulary.special_tokens)
        self._all_special = SpecialTokens(vocabulary.special_tokens, frozenset())
        self._no_special = SpecialTokens({}, frozenset())

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer directory (ours, or one with GPT-2's files or a `tokenizer.json`) or a `tokenizer.json`.

        Raises `UserError` when something is missing, damaged or does not fit together.
        """
        return cls(files.read_vocabulary(path))

    @classmethod
    def from_files(cls, vocab: Path | str, merges: Path | str, special_tokens: Path | str | None = None) -> Tokenizer:
        """Read GPT-2's `vocab.json` and `merges.txt` under any names, and a list of special tokens if there is one.

        All three are paths of files; names of special tokens go to `with_special_tokens`.
        """
        return cls(files.read_gpt2_files(vocab, merges, special_tokens))

    @classmethod
    def from_tiktoken(
        cls, path: Path | str, *, pattern: PatternName, special_tokens: Mapping[str, int] | None = None
    ) -> Tokenizer:
        """Read tiktoken's ranks, such as `cl100k_base.tiktoken`; pattern and special tokens are not in that file."""
        return cls(files.read_tiktoken(path, pattern, special_tokens or {}))

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

    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = "none",
        threads: int = 1,
    ) -> Ids:
        """The ids of `text`: `uint16 [n]`, or `uint32 [n]` where the vocabulary needs it.

        Any bytes are accepted and come back from `decode_bytes`. Text from strangers should be encoded with
        `allowed_special="none"`, else it can end the document; a disallowed special token in it is a `UserError`.
        A long text is shared among `threads` (0 = all cores), which does not change its ids.
        """
        is_short = len(text) <= SHORT_TEXT
        if is_short and disallowed_special == "none" and allowed_special in ("all", "none") and type(text) is str:
            ids = self._plain.encode_short(text)
            if ids is not None:
                return ids
        special = self._special(allowed_special, disallowed_special)
        if is_short or not readiness.pays(KERNELS, len(text)):
            return self._plain.encode(text, special)
        return self._compiled.encode(text, special, threads or num_cores())

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = "none",
        threads: int = 1,
    ) -> list[Ids]:
        """The ids of each text, as `encode` gives them."""
        special = self._special(allowed_special, disallowed_special)
        return list(self._encode_iterable(texts, special, threads))

    def encode_iterable(
        self,
        texts: Iterable[str | bytes],
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = "none",
        threads: int = 1,
    ) -> Iterator[Ids]:
        """Yield the ids of each text in order; a few megabytes of text are read ahead, and no more is held."""
        return self._encode_iterable(texts, self._special(allowed_special, disallowed_special), threads)

    def encode_files(
        self,
        paths: Iterable[Path | str],
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = "none",
        threads: int = 1,
    ) -> Iterator[Ids]:
        """Yield the ids of the files, one file after the other, each in pieces of a few megabytes; no more is held."""
        special = self._special(allowed_special, disallowed_special)
        for path in paths:
            yield from self._encode_iterable(file_pieces(path, special.names), special, threads)

    def count(
        self,
        text: str | bytes,
        *,
        allowed_special: SpecialNames = "all",
        disallowed_special: SpecialNames = "none",
        threads: int = 1,
    ) -> int:
        """How many ids `text` has."""
        return len(
            self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special, threads=threads)
        )

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes that `ids` (integers, one dimension) stand for; special tokens as they are written."""
        row = _as_row(ids)
        if row.size > SHORT_TEXT and readiness.pays(KERNELS, row.size):
            decoded = self._compiled_decoder.decode(row)
            if decoded is not None:
                return decoded
        return b"".join(map(self._bytes_of_id.__getitem__, self._checked(row)))

    def decode_batch(self, rows: Iterable[ArrayLike], errors: str = "replace") -> list[str]:
        """The text of each row of ids."""
        return [self.decode(ids, errors) for ids in rows]

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

    def _encode_iterable(self, texts: Iterable[str | bytes], special: SpecialTokens, threads: int) -> Iterator[Ids]:
        for batch in batches(texts):
            if readiness.pays(KERNELS, sum(map(len, batch))):
                yield from self._compiled.encode_batch(batch, special, threads or num_cores())
            else:
                for text in batch:
                    yield self._plain.encode(text, special)

    @cached_property
    def _compiled(self) -> CompiledEncoder:
        return readiness.load(KERNELS).CompiledEncoder(self.vocabulary, self.dtype)

    @cached_property
    def _compiled_decoder(self) -> CompiledDecoder:
        return readiness.load(KERNELS).CompiledDecoder(self._bytes_of_id)

    def _special(self, allowed: SpecialNames, disallowed: SpecialNames) -> SpecialTokens:
        if disallowed == "none" and isinstance(allowed, str):
            if allowed == "all":
                return self._all_special
            if allowed == "none":
                return self._no_special
        forbidden = self._names(disallowed, "disallowed_special")
        wanted = self._names(allowed, "allowed_special") | forbidden
        ids = {name: number for name, number in self.vocabulary.special_tokens.items() if name in wanted}
        return SpecialTokens(ids, forbidden)

    def _names(self, names: SpecialNames, argument: str) -> frozenset[str]:
        if isinstance(names, str):
            if names not in ("all", "none"):
                raise UserError(f"{argument} is {names!r}; it must be 'all', 'none' or a set of special tokens")
            return self._special_names if names == "all" else frozenset()
        if unknown := sorted(set(names) - self._special_names):
            known = ", ".join(self.vocabulary.special_tokens) or "none"
            raise UserError(f"{unknown[0]!r} is not a special token; known are {known}")
        return frozenset(names)

    def _special_id(self, name: str) -> int:
        if name not in self.vocabulary.special_tokens:
            raise UserError(f"the tokenizer has no {name} token; add it with with_special_tokens, or train it with one")
        return self.vocabulary.special_tokens[name]

    def _checked(self, row: NDArray[Any]) -> list[int]:
        # A negative index would silently count from the end.
        outside = row[(row < 0) | (row >= self.vocab_size)]
        unknown = outside if outside.size else row[~self._is_used[row]]
        if unknown.size:
            raise UserError(f"the id {unknown[0]} is not in the vocabulary, whose ids are below {self.vocab_size}")
        return row.tolist()


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


def _as_row(ids: ArrayLike) -> NDArray[Any]:
    row = np.asarray(ids)
    if row.size == 0:
        return np.empty(0, np.int64)
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise UserError(f"ids to decode must be one row of integers, not {row.dtype} of shape {row.shape}")
    return row


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bytes_of_id(vocabulary: Vocabulary) -> list[bytes]:
    """What each id decodes to; empty for an unused id."""
    table = [b""] * vocabulary.size
    for token, token_id in vocabulary.tokens.items():
        table[token_id] = token
    for name, token_id in vocabulary.special_tokens.items():
        table[token_id] = name.encode()
    return table
