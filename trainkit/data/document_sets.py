"""What a stream of text is read from: documents in numbered shards, or documents that can be fetched by their number.

Both give the same document for the same number, today and after a restart: that is all that the order of a run needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class Shard(Protocol):
    """One file's worth of documents, read from the front."""

    def read(self, start: int) -> Iterator[str]:
        """The documents from number `start` of this shard on; each call opens the shard anew.

        A `start` beyond the end gives none. What cannot be read is a `UserError` that names the shard and the row.
        """
        ...


@dataclass(frozen=True)
class ShardedDocuments:
    """A data set whose size is not known before it has been read."""

    shards: Sequence[Shard]
    identity: str
    """Changes when the documents or their order in the shards do: a run refuses to resume with another one."""


class IndexedDocuments(Protocol):
    """A data set of known size in which any document is found at once."""

    @property
    def identity(self) -> str:
        """As for `ShardedDocuments`."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> str: ...
