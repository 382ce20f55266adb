"""A data set whose every token says where it comes from, and what a run of some ranks makes of a stream of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from trainkit.data.document_sets import IndexedDocuments, ShardedDocuments
from trainkit.data.prefetch import prefetch
from trainkit.data.specs import PackedDataSpec, RowsDataSpec
from trainkit.data.streams import PackedSource, RowsSource, StreamSource
from trainkit.random import Purpose, derive_seed, permute
from trainkit.task import Batch

EOT = 0
MOST_TOKENS = 10_000
LENGTH = 16
SAMPLES = 16

Samples = dict[int, tuple[bytes, bytes]]
"""Tokens and documents of each sample."""


def text(document: int, tokens: int) -> str:
    """Token i of the document will be `MOST_TOKENS` * document + i + 1."""
    return f"{document}:{tokens}"


def encode(texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    pairs = (map(int, text.split(":")) for text in texts)
    return [np.arange(tokens) + MOST_TOKENS * document + 1 for document, tokens in pairs]


@dataclass(frozen=True)
class ListShard:
    texts: list[str]

    def read(self, start: int) -> Iterator[str]:
        return iter(self.texts[start:])


@dataclass(frozen=True)
class ListDocuments:
    texts: list[str]
    identity: str = "listed"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


def toy_texts(count: int, *, longest: int = 40, seed: int = 0) -> list[str]:
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count)
    return [text(document, int(tokens)) for document, tokens in enumerate(lengths)]


def in_shards(texts: list[str], sizes: Sequence[int]) -> ShardedDocuments:
    """Shards of these sizes, the last one with all that remains."""
    rest = iter(texts)
    shards = [ListShard(list(islice(rest, size))) for size in sizes]
    return ShardedDocuments([*shards, ListShard(list(rest))], "sharded")


def make_source(
    documents: ShardedDocuments | IndexedDocuments,
    packing: str = "concatenate",
    *,
    rank: int = 0,
    world_size: int = 1,
    device_batch_size: int = SAMPLES,
    seed: int = 5,
    **settings: Any,
) -> StreamSource:
    settings = {"lanes": 4, "shuffle_window": 7, "workers": 0, **settings}
    shared: dict[str, Any] = {
        "documents": documents,
        "encode": encode,
        "eot_id": EOT,
        "context_length": LENGTH,
        "samples_per_step": SAMPLES,
        "device_batch_size": device_batch_size,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
    }
    if packing == "rows":
        settings.pop("best_fit_documents", None)
        return RowsSource(spec=RowsDataSpec(**settings), **shared)
    settings = {"best_fit_documents": 9, **settings, "packing": packing}
    return PackedSource(spec=PackedDataSpec(**settings), **shared)


def run(
    make: Callable[[int, int], StreamSource],
    steps: int,
    *,
    ranks: int = 1,
    states: list[dict[str, Any]] | None = None,
    ahead: int = 0,
) -> tuple[Samples, list[dict[str, Any]]]:
    """What all ranks train on, and their states after it, read back from JSON."""
    samples: Samples = {}
    after: list[dict[str, Any]] = []
    for rank in range(ranks):
        with closing(prefetch(make(rank, ranks).steps(states), ahead)) as stream:
            taken = list(islice(stream, steps))
        for batches, _ in taken:
            for batch in batches:
                collect(batch, samples)
        after.append(json.loads(json.dumps(taken[-1][1])))
    return samples, after


def collect(batch: Batch, samples: Samples) -> None:
    assert {len(tensor) for tensor in batch.values()} == {len(batch["valid"])}
    for row in range(len(batch["valid"])):
        if batch["valid"][row]:
            number = int(batch["sample"][row])
            assert number not in samples
            samples[number] = batch["tokens"][row].numpy().tobytes(), batch["documents"][row].numpy().tobytes()


def lane_windows(samples: Samples, lanes: int) -> list[list[tuple[list[int], list[int]]]]:
    """For each lane its windows in order, tokens and documents."""
    result: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(lanes)]
    for number in sorted(samples):
        tokens, documents = (np.frombuffer(part, np.int64).tolist() for part in samples[number])
        result[number % SAMPLES // (SAMPLES // lanes)].append((tokens, documents))
    return result


def expected_order(
    documents: ShardedDocuments | ListDocuments, *, epochs: int, shuffle_window: int = 7, seed: int = 5
) -> list[str]:
    """The texts in the order in which they are numbered, by the definition."""
    order: list[str] = []
    for epoch in range(epochs):
        if isinstance(documents, ListDocuments):
            order += _permuted(documents.texts, shuffle_window > 0, derive_seed(seed, f"documents/{epoch}"))
            continue
        shards = _permuted(list(documents.shards), shuffle_window > 0, derive_seed(seed, f"shards/{epoch}"))
        texts = [text for shard in shards for text in shard.read(0) if text]
        for start in range(0, len(texts), shuffle_window or len(texts)):
            block = texts[start : start + (shuffle_window or len(texts))]
            order += _permuted(block, shuffle_window > 0, derive_seed(seed, f"documents/{epoch}/{start}"))
    return order


def _permuted(items: list[Any], is_shuffled: bool, key: int) -> list[Any]:
    if not is_shuffled or not items:
        return items
    return [items[i] for i in permute(np.arange(len(items)), len(items), key, Purpose.DATA_ORDER)]
