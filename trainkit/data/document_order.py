"""The order in which a run reads the documents of a data set, epoch after epoch.

Documents are numbered as the run reads them, on through all epochs; those without text are none. The order is read in
blocks, and the place of a block is enough to read on from there, in another process or after months.

- `ShardedDocuments`, whose size is not known: each epoch takes the shards in an order of its own and shuffles every
  block of `shuffle_window` documents, across the bounds of shards. An epoch that ends cuts its last block short.
- `IndexedDocuments`, whose size is known: each epoch is one permutation of everything.

Both shuffle by a key of seed and epoch (`trainkit.random`); with a `shuffle_window` of 0 both keep the order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from trainkit.data.document_sets import IndexedDocuments, ShardedDocuments
from trainkit.errors import UserError
from trainkit.random import Purpose, derive_seed, permute

_PLAIN_BLOCK = 1024
"""Documents of a block where its size changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block of documents begins; all of it fits into JSON."""

    number: int = 0
    """The number of its first document."""
    epoch: int = 0
    epoch_start: int = 0
    """The number of the first document of its epoch."""
    shard: int = 0
    """Shards of the epoch that are behind it."""
    row: int = 0
    """Rows of the next shard that are behind it."""

    @property
    def next_epoch(self) -> Place:
        """What follows if the epoch ends here."""
        return Place(number=self.number, epoch=self.epoch + 1, epoch_start=self.number)


class Block(NamedTuple):
    place: Place
    texts: list[tuple[int, str]]
    """The wanted documents of the block with their numbers, in order."""


class DocumentOrder(Protocol):
    def blocks(self, start: Place, is_wanted: Callable[[int], bool]) -> Generator[Block]:
        """Every block from `start` on, without end, with those of its documents whose number is wanted.

        A data set without any text is a `UserError`.
        """
        ...


def order_documents(documents: ShardedDocuments | IndexedDocuments, *, seed: int, shuffle_window: int) -> DocumentOrder:
    match documents:
        case ShardedDocuments():
            return ShardedOrder(documents, seed, shuffle_window)
        case _:
            return IndexedOrder(documents, seed, is_shuffled=shuffle_window > 0)


class _Row(NamedTuple):
    shard: int
    row: int
    text: str


@dataclass(frozen=True)
class ShardedOrder:
    documents: ShardedDocuments
    seed: int
    shuffle_window: int

    def blocks(self, start: Place, is_wanted: Callable[[int], bool]) -> Generator[Block]:
        place = start
        while True:
            rows = self._rows(place)
            while block := list(islice(rows, self.shuffle_window or _PLAIN_BLOCK)):
                order = enumerate(self._shuffled(place, len(block)), start=place.number)
                yield Block(place, [(number, block[i].text) for number, i in order if is_wanted(number)])
                behind = block[-1]
                place = replace(place, number=place.number + len(block), shard=behind.shard, row=behind.row + 1)
            if place.number == place.epoch_start:
                raise UserError("the data set has no document with text in it; check the path, the split and the field")
            place = place.next_epoch

    def _rows(self, place: Place) -> Iterator[_Row]:
        """The rest of an epoch."""
        for shard, index in enumerate(self._shards(place.epoch)[place.shard :], start=place.shard):
            start = place.row if shard == place.shard else 0
            for row, text in enumerate(self.documents.shards[index].read(start), start=start):
                if text:
                    yield _Row(shard, row, text)

    def _shards(self, epoch: int) -> list[int]:
        count = len(self.documents.shards)
        return _permutation(count, self.seed, f"shards/{epoch}") if self.shuffle_window else list(range(count))

    def _shuffled(self, place: Place, size: int) -> list[int]:
        if not self.shuffle_window:
            return list(range(size))
        return _permutation(size, self.seed, f"documents/{place.epoch}/{place.number - place.epoch_start}")


@dataclass(frozen=True)
class IndexedOrder:
    documents: IndexedDocuments
    seed: int
    is_shuffled: bool

    def blocks(self, start: Place, is_wanted: Callable[[int], bool]) -> Generator[Block]:
        size = len(self.documents)
        if not size:
            raise UserError("the data set has no documents; check the path and the split")
        place = start
        while True:
            epoch_end = place.epoch_start + size
            end = min(place.number + _PLAIN_BLOCK, epoch_end)
            numbers = [number for number in range(place.number, end) if is_wanted(number)]
            indices = self._indices(np.array(numbers, np.int64) - place.epoch_start, place.epoch)
            texts = zip(numbers, (self.documents[index] for index in indices), strict=True)
            yield Block(place, [(number, text) for number, text in texts if text])
            place = replace(place, number=end)
            if end == epoch_end:
                place = place.next_epoch

    def _indices(self, positions: npt.NDArray[np.int64], epoch: int) -> list[int]:
        if not self.is_shuffled or not len(positions):
            return positions.tolist()
        key = derive_seed(self.seed, f"documents/{epoch}")
        return permute(positions, len(self.documents), key, Purpose.DATA_ORDER).tolist()


def _permutation(size: int, seed: int, name: str) -> list[int]:
    if size < 2:
        return list(range(size))
    return permute(np.arange(size), size, derive_seed(seed, name), Purpose.DATA_ORDER).tolist()
