"""Batches of text that is read, shuffled, encoded and packed while the run trains: the same for any number of ranks.

Document d of the run (`document_order`) belongs to lane d mod `lanes`; a step takes B / `lanes` windows of each lane,
so that sample g is window j of lane l in step s, where g = s · B + l · B / lanes + j. A rank owns consecutive lanes. It
reads every block of the data, keeps the documents of its lanes, and cuts their windows (`packing`) into micro-batches.

The state of a lane says where its next window comes from: a document, how much of it is behind, and the place of its
block. No text and no tokens are kept: to resume, a rank reopens the shard at the block of its slowest lane, encodes
what it reads from there on, and drops what is behind. As lanes, not ranks, have states, any number of ranks that
divides the lanes resumes them.

Positions are those in the window, whatever the document: rotary embeddings see distances only, which the document mask
confines to a document. A model with absolute positions takes `transformerlm.models.positions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from trainkit.data.document_order import Place, order_documents
from trainkit.data.document_sets import IndexedDocuments, ShardedDocuments
from trainkit.data.lanes import Dealer, Encode, encode_documents
from trainkit.data.packing import Document, Position, Window, best_fit, concatenate, rows
from trainkit.data.specs import PackedDataSpec, RowsDataSpec
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamSource(ABC):
    """One rank's batches. See `trainkit.data.specs` and `trainkit.specs` for the settings.

    `prefetch` of the spec is left to the caller (`trainkit.data.prefetch`). Ranks that do not divide the lanes, and
    lanes that do not divide the samples of a step, are a `UserError` at construction.
    """

    documents: ShardedDocuments | IndexedDocuments
    encode: Encode
    eot_id: int
    spec: PackedDataSpec | RowsDataSpec
    context_length: int
    samples_per_step: int
    """B: samples of one step over all ranks."""
    device_batch_size: int
    """Most rows of a micro-batch."""
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert min(self.context_length, self.samples_per_step, self.device_batch_size, self.world_size) >= 1
        assert 0 <= self.rank < self.world_size
        lanes = self.spec.lanes
        if lanes % self.world_size:
            fitting = ", ".join(str(ranks) for ranks in range(1, lanes + 1) if lanes % ranks == 0)
            raise UserError(
                f"{self.world_size} ranks cannot share data.lanes = {lanes} evenly; start one of {fitting} ranks, or a "
                "new run with other lanes",
                EXIT_USAGE,
            )
        if self.samples_per_step % lanes:
            fitting = ", ".join(str(1 << i) for i in range(7) if self.samples_per_step % (1 << i) == 0)
            raise UserError(
                f"training.total_batch_size holds {self.samples_per_step} windows, which data.lanes = {lanes} cannot "
                f"share evenly; choose a total_batch_size of a multiple of {lanes} windows, or data.lanes of {fitting}",
                EXIT_USAGE,
            )

    @abstractmethod
    def windows(self, documents: Iterator[Document], offset: int) -> Iterator[Window]:
        """The windows of a lane from its next documents, `offset` being that of its `Position`."""

    @property
    @abstractmethod
    def packing(self) -> Mapping[str, Any]:
        """What the windows depend on besides, by name."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the samples depend on, by name: a state of another one is refused."""
        return {
            "data": self.documents.identity,
            "read": "in shards" if isinstance(self.documents, ShardedDocuments) else "by number",
            "context_length": self.context_length,
            "seed": self.seed,
            "lanes": self.spec.lanes,
            "shuffle_window": self.spec.shuffle_window,
            **self.packing,
        }

    @cached_property
    def lanes(self) -> range:
        """Those of this rank."""
        share = self.spec.lanes // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    def steps(self, states: list[dict[str, Any]] | None = None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        """Without end: this rank's micro-batches of the next step, and the JSON-able state after it.

        `states`: those of all ranks, of any number of them. A batch holds `tokens` and `documents`, int64 [rows,
        context_length + 1], `sample`, int64 [rows], and `valid`, bool [rows]. `documents` numbers the documents of a
        row from 0, -1 is fill. Rows that only fill the last micro-batch repeat a real row and are not `valid`. A state
        of other data or settings is a `UserError` that names the field.
        """
        next_sample, positions = self._resume(states)
        each = self.samples_per_step // self.spec.lanes
        with self._open_lanes(positions) as lanes:
            while True:
                windows = [next(lanes[lane]) for lane in self.lanes for _ in range(each)]
                batches = self._micro_batches(windows, next_sample + self.lanes.start * each)
                next_sample += self.samples_per_step
                last = zip(self.lanes, windows[each - 1 :: each], strict=True)
                yield batches, self._state(next_sample, {lane: window.after for lane, window in last})

    @contextmanager
    def _open_lanes(self, positions: dict[int, Position]) -> Generator[dict[int, Iterator[Window]]]:
        order = order_documents(self.documents, seed=self.seed, shuffle_window=self.spec.shuffle_window)
        workers = self.spec.workers
        pool = ThreadPoolExecutor(workers, thread_name_prefix="encode") if workers else None
        try:
            with closing(Dealer(order, self.spec.lanes, positions, blocks_ahead=min(workers, 1))) as dealer:
                yield {
                    lane: self.windows(
                        encode_documents(dealer.units(lane), self.encode, self.eot_id, pool), position.offset
                    )
                    for lane, position in positions.items()
                }
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _micro_batches(self, windows: list[Window], first_sample: int) -> list[Batch]:
        count = len(windows)
        size = min(self.device_batch_size, count)
        tokens = np.stack([window.tokens for window in windows])
        documents = np.stack([window.documents for window in windows])
        batches: list[Batch] = []
        for start in range(0, count, size):
            row = np.arange(start, start + size)
            valid = row < count
            # The rows that only fill repeat the first one; all others are views.
            place = slice(start, start + size) if valid.all() else np.where(valid, row, 0)
            arrays = {
                "tokens": tokens[place],
                "documents": documents[place],
                "sample": first_sample + np.where(valid, row, 0),
                "valid": valid,
            }
            batches.append({name: torch.from_numpy(array) for name, array in arrays.items()})
        return batches

    def _state(self, next_sample: int, positions: Mapping[int, Position]) -> dict[str, Any]:
        lanes = {str(lane): _lane_state(position) for lane, position in positions.items()}
        return {"next_sample": next_sample, "positions": lanes, **self.identity}

    def _resume(self, states: list[dict[str, Any]] | None) -> tuple[int, dict[int, Position]]:
        """The next sample, and where each lane of this rank begins."""
        if states is None:
            return 0, {lane: Position(lane, 0, Place()) for lane in self.lanes}
        for state in states:
            self._check(state)
        known = {lane: saved for state in states for lane, saved in state["positions"].items()}
        return int(states[0]["next_sample"]), {lane: _lane_position(known[str(lane)]) for lane in self.lanes}

    def _check(self, state: dict[str, Any]) -> None:
        for name in sorted({*self.identity, *state} - {"next_sample", "positions"}):
            if state.get(name) != self.identity.get(name):
                raise UserError(
                    f"the checkpoint was trained with {name} {state.get(name)}, the data is now read with {name} "
                    f"{self.identity.get(name)}; resume with the same data and the same settings of [data], or start a "
                    "new run"
                )


class PackedSource(StreamSource):
    """Windows full of text."""

    spec: PackedDataSpec

    def windows(self, documents: Iterator[Document], offset: int) -> Iterator[Window]:
        match self.spec.packing:
            case "concatenate":
                pack = concatenate
            case "best_fit":
                pack = partial(best_fit, group_size=self.spec.best_fit_documents, seed=self.seed)
        return pack(documents, offset, length=self.context_length, eot_id=self.eot_id)

    @property
    def packing(self) -> Mapping[str, Any]:
        fits = {"best_fit_documents": self.spec.best_fit_documents} if self.spec.packing == "best_fit" else {}
        return {"packing": self.spec.packing, **fits}


class RowsSource(StreamSource):
    """One document a window."""

    spec: RowsDataSpec

    def windows(self, documents: Iterator[Document], offset: int) -> Iterator[Window]:
        return rows(documents, offset, length=self.context_length, eot_id=self.eot_id)

    @property
    def packing(self) -> Mapping[str, Any]:
        return {"packing": "rows"}


def _lane_state(position: Position) -> dict[str, Any]:
    return {"document": position.document, "offset": position.offset, "block": dict(vars(position.place))}


def _lane_position(state: dict[str, Any]) -> Position:
    return Position(state["document"], state["offset"], Place(**state["block"]))
