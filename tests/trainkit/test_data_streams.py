"""Streams of documents: the same samples however the work is shared and interrupted, each document once an epoch."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainkit.streams import (
    EOT,
    LENGTH,
    SAMPLES,
    ListDocuments,
    ListShard,
    encode,
    expected_order,
    in_shards,
    lane_windows,
    make_source,
    run,
    text,
    toy_texts,
)
from trainkit.data import lanes as lanes_module
from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.streams import StreamSource
from trainkit.errors import EXIT_USAGE, UserError

PACKINGS = ["concatenate", "best_fit", "rows"]
TEXTS = toy_texts(100)
SHARDED = in_shards(TEXTS, [10, 1, 0, 30, 2, 25])
DATA: dict[str, Any] = {"sharded": SHARDED, "indexed": ListDocuments(TEXTS)}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Generator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("prefetch", "encode"))] == []


# -- the same samples everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_samples_do_not_depend_on_how_the_work_is_shared(packing: str, data: str) -> None:
    reference, _ = run(lambda rank, size: make_source(DATA[data], packing), steps=30)
    assert sorted(reference) == list(range(30 * SAMPLES))
    assert len(set(reference.values())) >= len(TEXTS)
    ways = [(1, 2, 3, 1), (1, 0, 0, 7), (2, 0, 0, 3), (2, 2, 3, 5), (4, 1, 0, 2), (4, 0, 1, 4), (4, 2, 0, 6)]
    for ranks, workers, ahead, rows in ways:

        def make(rank: int, size: int, workers: int = workers, rows: int = rows) -> StreamSource:
            shared: dict[str, Any] = {"rank": rank, "world_size": size, "device_batch_size": rows, "workers": workers}
            return make_source(DATA[data], packing, **shared)

        assert run(make, 30, ranks=ranks, ahead=ahead)[0] == reference


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("packing", PACKINGS)
def test_ten_resumes_with_other_numbers_of_ranks_change_nothing(packing: str, data: str) -> None:
    dice = random.Random(f"{packing}/{data}")

    def make(rank: int, size: int) -> StreamSource:
        return make_source(DATA[data], packing, rank=rank, world_size=size, workers=dice.choice([0, 2]))

    states, samples, total = None, {}, 0
    for _ in range(11):
        steps = dice.randint(1, 5)
        part, states = run(make, steps, ranks=dice.choice([1, 2, 4]), states=states, ahead=dice.choice([0, 3]))
        assert not samples.keys() & part.keys()
        samples |= part
        total += steps
    assert samples == run(lambda rank, size: make_source(DATA[data], packing), total)[0]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any),
    cuts=st.lists(st.integers(0, 10), max_size=6),
    packing=st.sampled_from(PACKINGS),
    window=st.sampled_from([0, 1, 3, 8, 1000]),
    lanes=st.sampled_from([1, 2, 4, 8]),
    group=st.integers(1, 20),
    is_sharded=st.booleans(),
    stops=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_any_data_is_resumed_and_shared(
    lengths: list[int],
    cuts: list[int],
    packing: str,
    window: int,
    lanes: int,
    group: int,
    is_sharded: bool,
    stops: list[int],
) -> None:
    texts = [text(document, tokens) if tokens else "" for document, tokens in enumerate(lengths)]
    # By number and in order, a lane may never meet a text: that is refused, below.
    is_sharded = is_sharded or "" in texts
    data = in_shards(texts, cuts) if is_sharded else ListDocuments(texts)

    def make(rank: int, size: int) -> StreamSource:
        settings: dict[str, Any] = {"lanes": lanes, "shuffle_window": window, "best_fit_documents": group}
        return make_source(data, packing, rank=rank, world_size=size, **settings)

    whole, _ = run(make, sum(stops))
    states, samples = None, {}
    for count, steps in enumerate(stops):
        part, states = run(make, steps, ranks=min(lanes, 1 << count), states=states)
        samples |= part
    assert samples == whole
    assert_lanes_hold_the_order(whole, data, packing, lanes=lanes, window=window, group=group)


# -- each document once ------------------------------------------------------------------------------------------------


def assert_lanes_hold_the_order(
    samples: dict[int, tuple[bytes, bytes]],
    data: ShardedDocuments | ListDocuments,
    packing: str,
    *,
    lanes: int = 4,
    window: int = 7,
    group: int = 9,
) -> int:
    """Reads the documents back from the windows; returns how many were read to their end."""
    one_epoch = len(expected_order(data, epochs=1, shuffle_window=window))
    most_documents = len(samples) * LENGTH // 2 + lanes * group
    order = expected_order(data, epochs=2 + most_documents // one_epoch, shuffle_window=window)
    done = 0
    for lane, windows in enumerate(lane_windows(samples, lanes)):
        tokens = [[*encode([one])[0].tolist(), EOT] for one in order[lane::lanes]]
        match packing:
            case "concatenate":
                stream = [token for document in tokens for token in document]
                found = [token for window, _ in windows for token in window[1:]]
                assert found == stream[: len(found)]
                assert windows[0][0][0] == EOT
                assert all(b[0][0] == a[0][-1] for a, b in pairwise(windows))
                done += found.count(EOT)
            case "rows":
                found_rows = [[t for t, d in zip(*window, strict=True) if d > 0] for window in windows]
                assert found_rows == [document[:LENGTH] for document in tokens[: len(windows)]]
                done += len(windows)
            case _:
                done += _read_back_groups(windows, tokens, group)
    return done


def _read_back_groups(windows: list[tuple[list[int], list[int]]], tokens: list[list[int]], group: int) -> int:
    """Each group of documents has its targets once each, before the next group begins."""
    rest = iter(windows)
    for start in range(0, len(tokens), group):
        wanted = sorted(token for document in tokens[start : start + group] for token in document)
        found: list[int] = []
        while len(found) < len(wanted):
            if (window := next(rest, None)) is None:
                return start
            found += [t for t, d in list(zip(*window, strict=True))[1:] if d >= 0]
        assert sorted(found) == wanted
    raise AssertionError("more windows than documents")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("window", [0, 7, 1000])
def test_no_document_is_lost_or_repeated(packing: str, data: str, window: int) -> None:
    samples, _ = run(lambda rank, size: make_source(DATA[data], packing, shuffle_window=window), steps=40)
    assert assert_lanes_hold_the_order(samples, DATA[data], packing, window=window) > 2 * len(TEXTS)


def test_every_epoch_is_another_order_of_all_documents() -> None:
    for data in DATA.values():
        order = expected_order(data, epochs=3)
        epochs = [order[start : start + len(TEXTS)] for start in range(0, len(order), len(TEXTS))]
        assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert expected_order(data, epochs=1, seed=6) != epochs[0]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("texts", [[text(0, 3)], [text(0, 200)], ["", text(1, 1), ""], toy_texts(3)])
def test_few_documents_serve_many_ranks(packing: str, texts: list[str]) -> None:
    data = in_shards(texts, [0, 0])

    def make(rank: int, size: int) -> StreamSource:
        return make_source(data, packing, rank=rank, world_size=size, lanes=16)

    samples, _ = run(make, 4, ranks=16)
    assert samples == run(make, 4)[0]
    assert_lanes_hold_the_order(samples, data, packing, lanes=16)


def test_slow_lanes_read_alone_where_too_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second document is long: without a limit half of all texts would wait for the lanes of the long ones."""
    texts = [text(document, 1 + 79 * (document % 2)) for document in range(200)]
    data = in_shards(texts, [50, 50])
    reads: list[int] = []
    most = 0
    take = lanes_module.Dealer._unit

    def watched(dealer: Any, lane: int) -> Any:
        nonlocal most
        most = max(most, sum(sum(one.characters.values()) for one in set(dealer._passes.values())))
        reads.append(len(set(dealer._passes.values())))
        return take(dealer, lane)

    monkeypatch.setattr(lanes_module.Dealer, "_unit", watched)

    def make(rank: int, size: int) -> StreamSource:
        return make_source(data, shuffle_window=0, lanes=4, rank=rank, world_size=size)

    monkeypatch.setattr("trainkit.data.document_order._PLAIN_BLOCK", 16)
    plain, states = run(make, 60)
    unbounded = most
    assert max(reads) == 1
    monkeypatch.setattr(lanes_module, "MOST_WAITING", 200)
    most = 0
    bounded, again = run(make, 60)
    assert bounded == plain and again == states
    assert max(reads) == 3 and most < 4 * 200 + 4 * 16 * 6 < unbounded


# -- errors ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BrokenShard(ListShard):
    def read(self, start: int) -> Iterator[str]:
        yield from self.texts[start:]
        raise UserError("row 7 of x is broken")


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_error_comes_in_its_place(packing: str) -> None:
    data = ShardedDocuments([ListShard(TEXTS[:60]), BrokenShard(TEXTS[60:])], "broken")
    results: list[tuple[int, Any]] = []
    for workers, ahead in ((0, 0), (1, 2), (3, 5)):
        seen: list[Any] = []
        with pytest.raises(UserError, match="row 7 of x is broken"):
            for batches, state in lanes_module.prefetch(
                make_source(data, packing, shuffle_window=8, workers=workers).steps(), ahead
            ):
                seen.append((batches[0]["tokens"].numpy().tobytes(), state))
        results.append((len(seen), seen))
    assert results[0][0] > 0
    assert results[1:] == results[:-1]


def test_a_failing_encoder_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    for workers in (0, 2):
        source = replace(make_source(SHARDED, workers=workers), encode=lambda texts: 1 / 0)  # type: ignore[arg-type,return-value]
        with pytest.raises(ZeroDivisionError):
            next(source.steps())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    "data", [in_shards([], []), in_shards(["", ""], [1]), ListDocuments([]), ListDocuments([""] * 5)]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_text_are_refused(packing: str, data: Any, workers: int) -> None:
    with pytest.raises(UserError, match="the data set has"):
        next(make_source(data, packing, workers=workers).steps())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 3}, "3 ranks cannot share data.lanes = 4 evenly; start one of 1, 2, 4 ranks"),
        ({"world_size": 8}, "8 ranks cannot share data.lanes = 4 evenly"),
        ({"lanes": 32}, "holds 16 windows, which data.lanes = 32 cannot share evenly; .* of 1, 2, 4, 8, 16$"),
    ],
)
def test_what_does_not_divide_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_source(SHARDED, **settings)
    assert error.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"documents": replace(SHARDED, identity="other")}, "data sharded"),
        ({"documents": ListDocuments(TEXTS, "sharded")}, "read in shards"),
        ({"seed": 6}, "seed 5"),
        ({"lanes": 8}, "lanes 4"),
        ({"shuffle_window": 8}, "shuffle_window 7"),
        ({"packing": "best_fit"}, "packing concatenate|best_fit_documents None"),
        ({"packing": "rows"}, "packing concatenate"),
    ],
)
def test_a_state_of_something_else_is_refused(changes: dict[str, Any], name: str) -> None:
    _, states = run(lambda rank, size: make_source(SHARDED), 1)
    arguments: dict[str, Any] = {"documents": SHARDED, **changes}
    with pytest.raises(UserError, match=f"was trained with ({name})"):
        next(make_source(arguments.pop("documents"), **arguments).steps(states))


# -- state and batches -------------------------------------------------------------------------------------------------


def test_a_resumed_stream_reads_no_shard_that_is_behind() -> None:
    opened: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Watched(ListShard):
        number: int

        def read(self, start: int) -> Iterator[str]:
            opened.append((self.number, start))
            return super().read(start)

    texts = toy_texts(400)
    data = ShardedDocuments([Watched(texts[start : start + 40], start // 40) for start in range(0, 400, 40)], "x")
    steps = make_source(data).steps()
    *_, (_, state) = islice(steps, 25)
    steps.close()
    before = [number for number, _ in opened]
    assert len(before) >= 6
    opened.clear()
    next(make_source(data).steps([state]))
    assert opened[0][0] in before[-2:] and len(opened) <= 3
    assert opened[0][1] > 0 or opened[0][0] == before[-1]


def test_a_state_is_small_and_says_where_each_lane_is() -> None:
    _, states = run(lambda rank, size: make_source(SHARDED, rank=rank, world_size=size), 7, ranks=2)
    assert [sorted(state["positions"]) for state in states] == [["0", "1"], ["2", "3"]]
    assert {state["next_sample"] for state in states} == {7 * SAMPLES}
    for state in states:
        for lane, position in state["positions"].items():
            assert position["document"] % 4 == int(lane)
            assert 0 <= position["document"] - position["block"]["number"] < 7
        assert len(str(state)) < 600


def test_micro_batches_have_one_size_and_fill_counts_nothing() -> None:
    for batches, _ in islice(make_source(SHARDED, device_batch_size=6).steps(), 3):
        assert [len(batch["valid"]) for batch in batches] == [6, 6, 6]
        assert [int(batch["valid"].sum()) for batch in batches] == [6, 6, 4]
        assert batches[2]["tokens"][4].equal(batches[0]["tokens"][0])
        assert int(batches[2]["sample"][5]) == int(batches[0]["sample"][0])
        assert {tensor.dtype for name, tensor in batches[0].items() if name != "valid"} == {batches[0]["tokens"].dtype}


def test_dropping_the_stream_stops_its_threads() -> None:
    steps = make_source(SHARDED, workers=3).steps()
    next(steps)
    assert any(thread.name.startswith("encode") for thread in threading.enumerate())
    del steps


def test_memory_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and tokens that wait, counted, do not grow with the documents read."""
    waiting: list[int] = []
    take = lanes_module.Dealer._unit

    def watched(dealer: Any, lane: int) -> Any:
        waiting.append(sum(len(queue) for queue in dealer._passes[lane].waiting.values()))
        return take(dealer, lane)

    monkeypatch.setattr(lanes_module.Dealer, "_unit", watched)
    data = in_shards(toy_texts(3000), [1000, 1000])
    for _ in islice(make_source(data, lanes=2, shuffle_window=50).steps(), 400):
        pass
    documents = 400 * SAMPLES * LENGTH / 21.5
    assert max(waiting) < 50 + 4 * documents**0.5 < documents / 10
