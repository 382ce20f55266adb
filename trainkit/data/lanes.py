"""The documents of a rank's lanes, encoded: read in few passes over the data, tokenized ahead by threads, in order.

Document d of the run belongs to lane d mod `lanes`. All lanes of a rank share one pass over the blocks. Lanes take
equal numbers of tokens, documents differ in length, so lanes drift apart, and texts of the slower ones wait: like a
random walk, by some multiple of the square root of the documents read. A lane whose waiting texts exceed `MOST_WAITING`
characters gives them back and goes on in a pass of its own, so that memory stays bounded however they drift: by that
limit and by three blocks for each pass (one in use, one read, one being read).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trainkit.data.document_order import Block, DocumentOrder, Place
from trainkit.data.packing import Document, Position
from trainkit.data.prefetch import prefetch
from trainkit.errors import UserError

Encode = Callable[[Sequence[str]], Sequence[npt.ArrayLike]]
"""The token ids of texts, without the end-of-text token. Called in several threads at once."""

MOST_WAITING = 1 << 25
_UNIT_DOCUMENTS = 64
_UNIT_CHARACTERS = 1 << 18
_UNITS_AHEAD = 2
_MOST_EPOCHS = 200
"""Epochs in which a lane finds no text before it is given up: more than there are lanes."""

T = TypeVar("T")
R = TypeVar("R")


class Text(NamedTuple):
    number: int
    place: Place
    text: str


class Dealer:
    """Deals the texts from `positions` (the next document of each lane of this rank) to the lanes."""

    def __init__(
        self, order: DocumentOrder, lanes: int, positions: Mapping[int, Position], *, blocks_ahead: int
    ) -> None:
        self._order = order
        self._lanes = lanes
        self._blocks_ahead = blocks_ahead
        start = min((position.place for position in positions.values()), key=lambda place: place.number)
        shared = self._open(start, {lane: position.document for lane, position in positions.items()})
        self._passes = dict.fromkeys(positions, shared)

    def units(self, lane: int) -> Iterator[list[Text]]:
        """The texts of a lane, as many at a time as are worth a call to encode them and are there: none is read for
        the sake of a full unit."""
        while True:
            yield self._unit(lane)

    def _unit(self, lane: int) -> list[Text]:
        current = self._passes[lane]
        first_epoch = None
        while not current.waiting[lane]:
            self._part_from_slow_lanes(current)
            block = current.read()
            first_epoch = block.place.epoch if first_epoch is None else first_epoch
            if block.place.epoch - first_epoch > _MOST_EPOCHS:
                raise UserError(
                    f"the data set has too few documents with text for data.lanes = {self._lanes}; choose fewer lanes"
                )
        return current.take(lane)

    def close(self) -> None:
        """Stop all threads; nothing can be taken afterwards."""
        for current in self._passes.values():
            current.blocks.close()

    def _part_from_slow_lanes(self, current: _Pass) -> None:
        for lane in [lane for lane, characters in current.characters.items() if characters > MOST_WAITING]:
            first = current.waiting[lane][0]
            self._passes[lane] = self._open(first.place, {lane: first.number})
            current.drop(lane)

    def _open(self, start: Place, first: dict[int, int]) -> _Pass:
        def is_wanted(number: int) -> bool:
            return number >= first.get(number % self._lanes, number + 1)

        return _Pass(prefetch(self._order.blocks(start, is_wanted), self._blocks_ahead), self._lanes, list(first))


class _Pass:
    """One reading of the data, from some place on, for some lanes."""

    def __init__(self, blocks: Generator[Block], lanes: int, mine: list[int]) -> None:
        self.blocks = blocks
        self.waiting: dict[int, deque[Text]] = {lane: deque() for lane in mine}
        self.characters = dict.fromkeys(mine, 0)
        self._lanes = lanes
        self._error: Exception | None = None

    def read(self) -> Block:
        # What cannot be read ends every lane, each where it meets it.
        if self._error is not None:
            raise self._error
        try:
            block = next(self.blocks)
        except Exception as error:
            self._error = error
            raise
        for number, text in block.texts:
            lane = number % self._lanes
            if lane in self.waiting:
                self.waiting[lane].append(Text(number, block.place, text))
                self.characters[lane] += len(text)
        return block

    def take(self, lane: int) -> list[Text]:
        waiting = self.waiting[lane]
        unit: list[Text] = []
        characters = 0
        while waiting and len(unit) < _UNIT_DOCUMENTS and characters < _UNIT_CHARACTERS:
            unit.append(waiting.popleft())
            characters += len(unit[-1].text)
        self.characters[lane] -= characters
        return unit

    def drop(self, lane: int) -> None:
        del self.waiting[lane], self.characters[lane]


def encode_documents(
    units: Iterator[list[Text]], encode: Encode, eot_id: int, pool: Executor | None
) -> Generator[Document]:
    """The texts as tokens, in order; with a `pool` a few units ahead."""
    for unit in map_ahead(partial(_encode_unit, encode=encode, eot_id=eot_id), units, pool, _UNITS_AHEAD):
        yield from unit


def map_ahead(function: Callable[[T], R], items: Iterator[T], pool: Executor | None, depth: int) -> Generator[R]:
    """`function` of each of the endless `items`, in order, up to `depth` of them ahead in the threads of a pool.

    An exception, of the function or of the items, is raised in the place of its result.
    """
    if pool is None:
        yield from map(function, items)
        return
    ahead: deque[Future[R]] = deque()
    error: Exception | None = None
    while True:
        while error is None and len(ahead) <= depth:
            try:
                ahead.append(pool.submit(function, next(items)))
            except Exception as caught:
                error = caught
        if not ahead:
            assert error is not None
            raise error
        yield ahead.popleft().result()


def _encode_unit(unit: list[Text], encode: Encode, eot_id: int) -> list[Document]:
    rows = [np.asarray(ids) for ids in encode([text.text for text in unit])]
    assert len(rows) == len(unit)
    end = np.array([eot_id])
    parts: list[npt.NDArray[Any]] = [part for row in rows for part in (row, end)]
    tokens = np.concatenate(parts, dtype=np.int32, casting="unsafe")
    documents: list[Document] = []
    start = 0
    for text, row in zip(unit, rows, strict=True):
        documents.append(Document(text.number, text.place, tokens[start : start + len(row) + 1]))
        start += len(row) + 1
    return documents
