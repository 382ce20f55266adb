"""Orders of samples: Megatron-LM's against a plain reading of its rules, blends against exact arithmetic.

`test_data_megatron_core.py` compares with megatron-core itself, where that is installed.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data import blends
from trainkit.data.blends import Blend, deal_by_greedy_error, deal_by_weight, megatron_shares
from trainkit.data.megatron import IndexedTokens
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.orders import MegatronOrder, Order, StableOrder, build_order
from trainkit.data.windows import MegatronSource
from trainkit.errors import UserError


def tokens_of(prefix: Path, lengths: list[int], first: int = 0) -> IndexedTokens:
    """Token i of the file is `first` + i, so that a window shows where it lies."""
    with IndexedWriter(prefix, "int32") as writer:
        writer.add(first + np.arange(sum(lengths)), np.array(lengths))
    return IndexedTokens.open(prefix)


# -- megatron ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 4),
    st.integers(1, 4),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_the_order_of_megatron_is_its_rules(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, num_samples: int, seed: int
) -> None:
    data = tokens_of(tmp_path_factory.mktemp("data") / "x", lengths)
    order = MegatronOrder(data, length, seed, num_samples)
    total = sum(lengths)
    epochs = next(n for n in range(1, 10**6) if n * total > num_samples * length)
    assert len(order.document_index) == epochs * len(lengths)
    assert sorted(order.document_index.tolist()) == sorted([*range(len(lengths))] * epochs)
    stream = [(place, token) for place, number in enumerate(order.document_index) for token in data.document(number)]
    count = (epochs * total - 1) // length
    assert sorted(order.shuffle_index.tolist()) == list(range(count)) and count >= num_samples
    # The last epoch is apart where less than 80 % of it is needed: the others come first, whole.
    whole = ((epochs - 1) * total - 1) // length
    if epochs > 1 and num_samples - whole < int(0.8 * ((total - 1) // length)):
        assert sorted(order.shuffle_index[:whole].tolist()) == list(range(whole))
        assert sorted(order.document_index[-len(lengths) :].tolist()) == list(range(len(lengths)))
    tokens, documents = order.read(np.arange(count))
    assert tokens.dtype == documents.dtype == np.int64
    for row, numbers, window in zip(tokens.tolist(), documents.tolist(), order.shuffle_index.tolist(), strict=True):
        piece = stream[window * length : window * length + length + 1]
        assert row == [token for _, token in piece]
        assert numbers == [0, *np.cumsum([a != b for (a, _), (b, _) in pairwise(piece)]).tolist()]
        place, offset = order.sample_index[window]
        if window:
            assert (place, data.document(order.document_index[place])[offset]) == stream[window * length]
        else:
            assert (place, offset) == (0, 0)


def test_recorded_indices_of_megatron_core(tmp_path: Path) -> None:
    """`GPTDataset` of megatron-core 0.16.1, the last epoch apart and not."""
    data = tokens_of(tmp_path / "x", [5, 3, 0, 8, 1])
    for num_samples, documents, shuffle in RECORDED:
        order = MegatronOrder(data, 4, 1234, num_samples)
        assert order.document_index.tolist() == documents
        assert order.shuffle_index.tolist() == shuffle


RECORDED = [
    (3, [4, 0, 1, 2, 3], [2, 1, 3, 0]),
    (10, [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1], [1, 0, 3, 5, 2, 7, 4, 6, 10, 9, 11, 8]),
    (12, [3, 1, 0, 2, 4, 2, 0, 2, 1, 4, 3, 4, 0, 1, 3], [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10]),
]


def source(order: Order, **changes: int) -> MegatronSource:
    return MegatronSource(order=order, **{"samples_per_step": 6, "device_batch_size": 4, **changes})


def test_a_run_in_the_order_of_megatron_has_an_end_and_a_length(tmp_path: Path) -> None:
    data = tokens_of(tmp_path / "x", [7, 30, 2])
    arguments: dict[str, Any] = {"weights": [], "context_length": 5, "seed": 3}
    order = build_order("megatron", [data], num_samples=30, **arguments)
    steps = list(source(order).steps())
    assert len(steps) == 5
    state = steps[1][1]
    resumed = list(source(order).steps([state]))
    for (expected, _), (found, _) in zip(steps[2:], resumed, strict=True):
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(expected, found, strict=True))
    longer = build_order("megatron", [data], num_samples=36, **arguments)
    with pytest.raises(UserError, match=r"depends on training.max_steps.*30 samples.*36; .*new run"):
        next(source(longer).steps([state]))
    stable = build_order("stable", [data], num_samples=36, **arguments)
    with pytest.raises(UserError, match=r"trained with num_samples 30|trained with order megatron"):
        next(source(stable).steps([state]))
    assert stable.identity == build_order("stable", [data], num_samples=7, **arguments).identity


def test_seeds_that_numpy_does_not_take(tmp_path: Path) -> None:
    data = tokens_of(tmp_path / "x", [20])
    arguments: dict[str, Any] = {"weights": [], "context_length": 5, "num_samples": 9}
    build_order("megatron", [data], seed=2**32 - 1, **arguments).read(np.arange(2))
    with pytest.raises(UserError, match="a seed below"):
        build_order("megatron", [data], seed=2**32, **arguments)


# -- blends ------------------------------------------------------------------------------------------------------------

weights_of = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@given(weights_of, st.integers(1, 400))
def test_stable_blends_keep_the_weights_at_every_length(weights: list[float], count: int) -> None:
    owners, within = deal_by_weight(weights)(np.arange(count))
    depth = max(1, (len(weights) - 1).bit_length())
    for member, weight in enumerate(weights):
        had = np.cumsum(owners == member)
        wanted = weight / sum(weights) * np.arange(1, count + 1)
        assert np.abs(had - wanted).max() <= depth + 1e-6
        assert within[owners == member].tolist() == list(range(had[-1]))  # none of its samples twice, none left out


@given(weights_of, st.lists(st.integers(0, 2**62 - 2), min_size=1, max_size=5))
def test_stable_blends_far_ahead_are_exact(weights: list[float], samples: list[int]) -> None:
    """64-bit arithmetic on halves gives what whole numbers give."""

    def exact(turn: int, shares: list[float]) -> tuple[int, int]:
        if len(shares) == 1:
            return 0, turn
        middle = len(shares) // 2
        share = min(max(round(sum(shares[:middle]) / sum(shares) * 2**32), 1), 2**32 - 1)
        before, after = ((Fraction(n * share, 2**32) + Fraction(1, 2)) // 1 for n in (turn, turn + 1))
        if after > before:
            return exact(int(before), shares[:middle])
        owner, number = exact(turn - int(before), shares[middle:])
        return owner + middle, number

    owners, within = deal_by_weight(weights)(np.array(samples))
    assert list(zip(owners.tolist(), within.tolist(), strict=True)) == [exact(sample, weights) for sample in samples]


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.integers(1, 300))
def test_the_greedy_blend_serves_who_is_furthest_behind(weights: list[float], size: int) -> None:
    owners, within = deal_by_greedy_error(weights, size, [size] * len(weights))(np.arange(size))
    shares = np.array(weights) / np.sum(weights)
    shares = shares / shares.sum()
    counts = np.zeros(len(weights))
    for sample in range(size):
        owner = int(np.argmax(shares * max(sample, 1) - counts))
        assert (owners[sample], within[sample]) == (owner, counts[owner])
        counts[owner] += 1


def test_the_compiled_greedy_blend_is_the_written_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = deal_by_greedy_error([0.3, 0.3, 0.7], 999, [999] * 3)(np.arange(999))
    monkeypatch.setattr(blends, "_compiled_greedy", lambda: blends._greedy)
    written = deal_by_greedy_error([0.3, 0.3, 0.7], 999, [999] * 3)(np.arange(999))
    assert all(np.array_equal(a, b) for a, b in zip(compiled, written, strict=True))


def test_a_greedy_blend_that_asks_for_too_much_is_refused() -> None:
    with pytest.raises(UserError, match=r"asks entry 1 of data.blend_prefixes for 5 samples and lays out 4"):
        deal_by_greedy_error([1.0, 1.0], 10, [5, 4])
    assert megatron_shares([1.0, 3.0], 10) == (3 + 8, [4, 9])


@pytest.mark.parametrize("name", ["stable", "megatron"])
def test_each_sample_of_a_blend_is_one_of_its_member(tmp_path: Path, name: Any) -> None:
    data = [tokens_of(tmp_path / f"{i}", [40, 3, 70], first=1000 * i) for i in range(3)]
    weights = [1.0, 5.0, 2.0]
    order = build_order(name, data, weights, context_length=4, seed=1, num_samples=60)
    assert isinstance(order, Blend)
    samples = np.random.default_rng(0).permutation(60)
    tokens, documents = order.read(samples)
    owners, within = order.deal(samples)
    assert (tokens // 1000 == owners[:, None]).all()
    for row, numbers, owner, number in zip(tokens, documents, owners, within, strict=True):
        expected = order.members[owner].read(np.array([number]))
        assert row.tolist() == expected[0][0].tolist() and numbers.tolist() == expected[1][0].tolist()
    assert np.abs(np.bincount(owners) - np.array([7.5, 37.5, 15])).max() <= 2
    # Files of equal length are not walked through in step.
    if name == "stable":
        firsts = [member.read(np.arange(9))[0][:, 0] % 1000 for member in order.members]
        assert firsts[0].tolist() != firsts[1].tolist()


@pytest.mark.parametrize("name", ["stable", "megatron"])
def test_a_blend_is_the_same_for_any_ranks_and_resumes(tmp_path: Path, name: Any) -> None:
    data = [tokens_of(tmp_path / f"{i}", [40, 3, 70], first=1000 * i) for i in range(2)]

    def order(seed: int = 1, weights: tuple[float, ...] = (1.0, 2.0)) -> Order:
        return build_order(name, data, weights, context_length=4, seed=seed, num_samples=60)

    def rows(ranks: int, start: int, state: dict[str, Any] | None = None, **changes: int) -> list[list[int]]:
        found = []
        for step in range(start, 10):
            for rank in range(ranks):
                one = source(order(), rank=rank, world_size=ranks, **changes)
                batches, _ = next(islice(one.steps([state] if state else None), step - start, None))
                found += [row.tolist() for b in batches for row, ok in zip(b["tokens"], b["valid"], strict=True) if ok]
        return found

    expected = rows(1, 0)
    assert rows(4, 0, device_batch_size=1) == expected
    state = next(islice(source(order()).steps(), 3, None))[1]
    assert rows(2, 4, state) == expected[4 * 6 :]
    for other, words in ((order(seed=2), "seed 1"), (order(weights=(1.0, 3.0)), "weights")):
        with pytest.raises(UserError, match=f"trained with {words}"):
            next(source(other).steps([state]))


def test_a_file_that_is_too_short_is_named(tmp_path: Path) -> None:
    data = [tokens_of(tmp_path / "long", [40]), tokens_of(tmp_path / "short", [4])]
    with pytest.raises(UserError, match="short holds 4 tokens, one window of context_length 4 takes 5"):
        build_order("stable", data, [1.0, 1.0], context_length=4, seed=1, num_samples=5)


def test_a_longer_run_only_appends(tmp_path: Path) -> None:
    data = tokens_of(tmp_path / "x", [50])
    short, long = (
        build_order("stable", [data], [], context_length=4, seed=1, num_samples=n).read(np.arange(n))[0]
        for n in (20, 100)
    )
    assert isinstance(build_order("stable", [data], [], context_length=4, seed=1, num_samples=9), StableOrder)
    assert np.array_equal(short, long[:20])
