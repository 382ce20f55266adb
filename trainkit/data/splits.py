"""Views of documents: a share of them held out, the first so many, long ones cut.

A view numbers its documents as the data beneath it does: documents that it leaves out are the empty text, which no
pipeline trains on. So reading may begin at any document of a view as it may beneath it. (`cut` makes more documents of
one, and has to count from the front.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, TypeAlias

from trainkit.data.document_sets import IndexedDocuments, Shard, ShardedDocuments

Split: TypeAlias = Literal["train", "val", "test"]
Documents: TypeAlias = ShardedDocuments | IndexedDocuments


def split_of(text: str, validation_fraction: float, test_fraction: float) -> Split:
    """Which split a document belongs to, decided by its text alone.

    Equal texts are never on both sides, data may grow or be put into another order, and a larger fraction only adds to
    the documents of a smaller one. The two fractions sum to less than 1.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"split").digest()
    place = int.from_bytes(digest, "little")
    if place < validation_fraction * 2**64:
        return "val"
    return "test" if 2**64 - 1 - place < test_fraction * 2**64 else "train"


def iterate(documents: Documents) -> Iterator[str]:
    """All documents in order, without the empty ones."""
    if isinstance(documents, ShardedDocuments):
        return (text for shard in documents.shards for text in shard.read(0) if text)
    return (text for index in range(len(documents)) if (text := documents[index]))


def only(documents: Documents, split: Split, validation_fraction: float, test_fraction: float) -> Documents:
    """The documents of one split; those of the others are empty texts."""
    change = partial(_unless_elsewhere, split, validation_fraction, test_fraction)
    identity = _identity(documents, "only", split, validation_fraction, test_fraction)
    if isinstance(documents, ShardedDocuments):
        return ShardedDocuments([_Changed(shard, change) for shard in documents.shards], identity)
    return _ChangedDocuments(documents, change, identity)


def first(documents: Documents, count: int) -> Documents:
    """The first `count` documents. Data of unknown size are read once to find where these end."""
    identity = _identity(documents, "first", count)
    if not isinstance(documents, ShardedDocuments):
        return _FirstDocuments(documents, min(count, len(documents)), identity)
    shards: list[Shard] = []
    for shard in documents.shards:
        if not count:
            break
        held = sum(1 for _ in islice(shard.read(0), count))
        shards.append(_Beginning(shard, held))
        count -= held
    return ShardedDocuments(shards, identity)


def cut(documents: ShardedDocuments, characters: int) -> ShardedDocuments:
    """Documents of at most so many characters, see `pieces`."""
    shards = [_Cut(shard, characters) for shard in documents.shards]
    return ShardedDocuments(shards, _identity(documents, "cut", characters))


def joined(parts: Sequence[ShardedDocuments]) -> ShardedDocuments:
    """The shards of all parts in order."""
    shards = [shard for part in parts for shard in part.shards]
    return ShardedDocuments(shards, _hash("joined", *(part.identity for part in parts)))


def pieces(text: str, characters: int) -> Iterator[str]:
    """`text` in pieces of at most so many characters that add up to it.

    A piece ends behind the last blank line of its second half, else behind its last line break, else its last space,
    else wherever it is full.
    """
    start = 0
    while len(text) - start > characters:
        end = start + characters
        middle = start + characters // 2
        for mark in ("\n\n", "\n", " "):
            if (found := text.rfind(mark, middle, end)) >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _unless_elsewhere(split: Split, validation_fraction: float, test_fraction: float, text: str) -> str:
    return text if split_of(text, validation_fraction, test_fraction) == split else ""


def _identity(documents: Documents, *facts: object) -> str:
    return _hash(documents.identity, *facts)


def _hash(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass(frozen=True)
class _Changed:
    shard: Shard
    change: Callable[[str], str]

    def read(self, start: int) -> Iterator[str]:
        return map(self.change, self.shard.read(start))


@dataclass(frozen=True)
class _Beginning:
    shard: Shard
    count: int

    def read(self, start: int) -> Iterator[str]:
        return islice(self.shard.read(start), max(self.count - start, 0))


@dataclass(frozen=True)
class _Cut:
    shard: Shard
    characters: int

    def read(self, start: int) -> Iterator[str]:
        return islice((piece for text in self.shard.read(0) for piece in pieces(text, self.characters)), start, None)


@dataclass(frozen=True)
class _ChangedDocuments:
    documents: IndexedDocuments
    change: Callable[[str], str]
    identity: str

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int, /) -> str:
        return self.change(self.documents[index])


@dataclass(frozen=True)
class _FirstDocuments:
    documents: IndexedDocuments
    count: int
    identity: str

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> str:
        return self.documents[index]
