"""The order of samples: each window once an epoch, the same for any ranks and micro-batches, and from any state."""

from __future__ import annotations

import json
import math
import random
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.megatron import IndexedTokens, bin_path, idx_path
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.orders import StableOrder, build_order, gather_windows
from trainkit.data.prefetch import prefetch
from trainkit.data.specs import OrderName
from trainkit.data.windows import MegatronSource
from trainkit.errors import UserError

LENGTH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> IndexedTokens:
    """Token i of the stream is i, so that a window shows where it lies."""
    prefix = tmp_path_factory.mktemp("data") / "x"
    lengths = np.random.default_rng(3).integers(1, 20, size=60)
    with IndexedWriter(prefix, "uint16") as writer:
        writer.add(np.arange(lengths.sum()), lengths)
    return IndexedTokens.open(prefix)


def source(data: IndexedTokens, **changes: int) -> MegatronSource:
    sizes = {"samples_per_step": 10, "device_batch_size": 4, "rank": 0, "world_size": 1}
    return MegatronSource(
        order=build_order(
            "stable",
            [data],
            [],
            context_length=changes.get("context_length", LENGTH),
            seed=changes.get("seed", 1),
            num_samples=1000,
        ),
        **{name: changes.get(name, size) for name, size in sizes.items()},
    )


def real_rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, list[int], list[int]]]:
    """(sample, tokens, documents) of the rows that count, in order."""
    rows = []
    for batch in batches:
        columns = [batch[name].tolist() for name in ("sample", "tokens", "documents", "valid")]
        rows += [
            (sample, tokens, documents) for sample, tokens, documents, valid in zip(*columns, strict=True) if valid
        ]
    return rows


def run(sources: list[MegatronSource], steps: int, state: dict[str, Any] | None = None) -> list[Any]:
    """What each step trains on, over all ranks in order."""
    ranks = [list(islice(one.steps([state] if state else None), steps)) for one in sources]
    return [[row for step in zipped for row in real_rows(step[0])] for zipped in zip(*ranks, strict=True)]


def test_an_epoch_holds_each_window_once_and_epochs_differ(data: IndexedTokens) -> None:
    one = StableOrder(data, LENGTH, 1)
    count = (len(data.tokens) - 1) // LENGTH
    assert one.windows == count
    order = one.window_of(np.arange(3 * count))
    epochs = [order[i * count : (i + 1) * count].tolist() for i in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(count))]}) == 4
    other_seed = StableOrder(data, LENGTH, 2).window_of(np.arange(count)).tolist()
    assert sorted(other_seed) == list(range(count)) and other_seed != epochs[0]


def test_samples_are_read_where_the_order_says(data: IndexedTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks that `read` asks for at once."""
    samples = np.random.default_rng(0).permutation(300)
    for block in (1, 7, 1024):
        monkeypatch.setattr("trainkit.data.orders.BLOCK", block)
        one = StableOrder(data, LENGTH, 1)
        assert (one.read(samples)[0][:, 0] == one.window_of(samples) * LENGTH).all()


def test_windows_hold_the_tokens_and_overlap_by_one(data: IndexedTokens) -> None:
    one = StableOrder(data, LENGTH, 1)
    steps = run([source(data)], 2 * one.windows // 10)
    rows = [row for step in steps for row in step]
    assert [sample for sample, _, _ in rows] == list(range(len(rows)))
    for sample, tokens, _ in rows:
        start = int(one.window_of(np.array([sample]))[0]) * LENGTH
        assert tokens == list(range(start, start + LENGTH + 1))
    targets = sorted(token for _, tokens, _ in rows[: one.windows] for token in tokens[1:])
    assert targets == list(range(1, one.windows * LENGTH + 1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("device_batch_size", [1, 3, 4, 64])
@pytest.mark.parametrize("samples_per_step", [1, 10, 150])
def test_order_does_not_depend_on_ranks_and_micro_batches(
    data: IndexedTokens, world_size: int, device_batch_size: int, samples_per_step: int
) -> None:
    """Also where a step is longer than an epoch (70 windows), and where there are more ranks than samples."""
    steps = 10 if samples_per_step < 100 else 2
    expected = run([source(data, samples_per_step=samples_per_step)], steps)
    changes = {"samples_per_step": samples_per_step, "device_batch_size": device_batch_size, "world_size": world_size}
    ranks = [source(data, rank=rank, **changes) for rank in range(world_size)]
    assert run(ranks, steps) == expected
    counts = []
    rows = min(device_batch_size, math.ceil(samples_per_step / world_size))  # no more filler than the shares differ
    for one in ranks:
        batches, _ = next(one.steps())
        assert batches
        for batch in batches:
            assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
                "tokens": (torch.int64, (rows, LENGTH + 1)),
                "documents": (torch.int64, (rows, LENGTH + 1)),
                "sample": (torch.int64, (rows,)),
                "valid": (torch.bool, (rows,)),
            }
            assert batch["sample"].max() < samples_per_step  # a filler repeats a sample of the same step
        counts.append(sum(int(batch["valid"].sum()) for batch in batches))
    assert sum(counts) == samples_per_step and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("at", [0, 1, 2, 7, 19])
def test_resuming_continues_identically_with_other_ranks(data: IndexedTokens, at: int) -> None:
    undisturbed = run([source(data)], 20)
    states = [state for _, state in islice(source(data, world_size=2).steps(), 20)]
    state = json.loads(json.dumps(states[at - 1])) if at else None
    resumed = [source(data, rank=rank, world_size=4, device_batch_size=2) for rank in range(4)]
    assert run(resumed, 20 - at, state) == undisturbed[at:]


@pytest.mark.parametrize("order", ["stable", "megatron"])
def test_ten_resumes_with_other_numbers_of_ranks_change_nothing(data: IndexedTokens, order: OrderName) -> None:
    dice = random.Random(order)
    pieces = [dice.randint(1, 5) for _ in range(11)]
    samples = build_order(order, [data], [], context_length=LENGTH, seed=1, num_samples=10 * sum(pieces))

    def ranks(size: int) -> list[MegatronSource]:
        shared = {"order": samples, "samples_per_step": 10, "world_size": size}
        return [MegatronSource(**shared, rank=rank, device_batch_size=dice.randint(1, 9)) for rank in range(size)]

    state, found = None, []
    for steps in pieces:
        sources = ranks(dice.choice([1, 2, 3, 4]))
        found += run(sources, steps, state)
        *_, (_, after) = islice(prefetch(sources[-1].steps([state] if state else None), dice.choice([0, 3])), steps)
        state = json.loads(json.dumps(after))
    assert found == run(ranks(1), sum(pieces))
    assert [row[0] for step in found for row in step] == list(range(10 * sum(pieces)))


def test_resuming_in_small_pieces(data: IndexedTokens) -> None:
    expected = run([source(data)], 15)
    state, pieces = None, []
    for _ in range(15):
        pieces += run([source(data)], 1, state)
        state = next(source(data).steps([state] if state else None))[1]
    assert pieces == expected


def test_a_state_of_other_data_is_refused(data: IndexedTokens, tmp_path: Path) -> None:
    _, state = next(source(data).steps())
    with IndexedWriter(tmp_path / "y", "uint16") as writer:
        writer.add(np.arange(500))
    for other, words in (
        (source(IndexedTokens.open(tmp_path / "y")), "data"),
        (source(data, context_length=9), "context_length 8"),
        (source(data, seed=2), "seed 1"),
    ):
        with pytest.raises(UserError, match=f"trained with {words}.*resume with the same"):
            next(other.steps([state]))


def test_a_state_follows_the_files_to_another_place(data: IndexedTokens, tmp_path: Path) -> None:
    _, state = next(source(data).steps())
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"moved{suffix}").write_bytes(Path(f"{data.prefix}{suffix}").read_bytes())
    moved = source(IndexedTokens.open(tmp_path / "moved"))
    assert run([moved], 1, state) == run([source(data)], 2)[1:]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 5),
    st.integers(1, 5),
    st.sampled_from(["uint8", "int32"]),
    st.sampled_from([1, 3, 64]),
)
def test_documents_against_brute_force(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, dtype: str, stride: int
) -> None:
    prefix = tmp_path_factory.mktemp("data") / "x"
    owner = np.repeat(np.arange(len(lengths)), lengths)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add(np.arange(sum(lengths)) % 100, np.array(lengths))
    data = IndexedTokens.open(prefix)
    starts = np.arange(sum(lengths) - length)
    with patch("trainkit.data.megatron._STRIDE", stride):
        tokens, documents = gather_windows(data, starts, length)
    assert tokens.dtype == documents.dtype == np.int64
    for start in starts:
        window = slice(start, start + length + 1)
        assert tokens[start].tolist() == data.tokens[window].tolist()
        changes = np.diff(owner[window]) > 0  # an empty document between two others gives no number of its own
        assert documents[start].tolist() == [0, *np.cumsum(changes).tolist()]


def test_a_window_without_a_document_border(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add(np.arange(100))
    (batch,), _ = next(source(IndexedTokens.open(tmp_path / "x"), samples_per_step=4).steps())
    assert not batch["documents"].any()


def test_too_few_tokens(tmp_path: Path) -> None:
    for count, words in ((LENGTH, "holds 8 tokens.*takes 9"), (LENGTH + 1, "")):
        with IndexedWriter(tmp_path / f"{count}", "uint16") as writer:
            writer.add(np.arange(count))
        data = IndexedTokens.open(tmp_path / f"{count}")
        if words:
            with pytest.raises(UserError, match=words):
                source(data)
        else:
            assert StableOrder(data, LENGTH, 1).windows == 1
            assert run([source(data, samples_per_step=3)], 1)[0][2][1] == list(range(count))


def test_opening_and_seeking_touch_little_of_a_huge_file(tmp_path: Path) -> None:
    """10⁹ tokens in a sparse file: the last sample of the epoch is found without reading the others."""
    documents, each = 1000, 1_000_000
    with bin_path(tmp_path / "x").open("wb") as file:
        file.truncate(documents * each * 2)
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([8])
    tables = (
        np.array([documents, documents + 1], "<u8"),
        np.full(documents, each, "<i4"),
        np.arange(documents, dtype="<i8") * each * 2,
        np.arange(documents + 1, dtype="<i8"),
    )
    idx_path(tmp_path / "x").write_bytes(header + b"".join(table.tobytes() for table in tables))
    one = source(IndexedTokens.open(tmp_path / "x"), context_length=1024)
    windows = (documents * each - 1) // 1024
    state = {"next_sample": windows - one.samples_per_step, **one.order.identity}
    batches, after = next(one.steps([state]))
    assert after["next_sample"] == windows and not batches[0]["tokens"].any()
