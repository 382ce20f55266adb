"""The background thread changes nothing but the time, and never outlives its consumer."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from itertools import count, islice

import pytest

from trainkit.data.prefetch import prefetch


def workers() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Generator[None]:
    yield
    assert workers() == 0


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 1000])
def test_same_items_in_the_same_order(depth: int) -> None:
    assert list(prefetch(iter(range(100)), depth)) == list(range(100))
    assert list(prefetch(iter([]), depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_runs_ahead_by_no_more_than_depth(depth: int) -> None:
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for i in count():
            made.append(i)
            if len(made) == 5 + depth:
                reached.set()
            yield i

    ahead = prefetch(items(), depth)
    assert list(islice(ahead, 5)) == list(range(5))
    assert reached.wait(10)
    assert len(made) == 5 + depth
    ahead.close()
    assert len(made) == 5 + depth


def test_depth_zero_has_no_thread() -> None:
    plain = prefetch(count(), 0)
    next(plain)
    assert workers() == 0
    plain.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_exception_comes_in_its_place(depth: int) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise KeyError("broken")

    seen: list[int] = []
    with pytest.raises(KeyError, match="broken") as error:
        for item in prefetch(items(), depth):
            seen.append(item)
    assert seen == [0, 1, 2]
    assert any(entry.name == "items" for entry in error.traceback)


@pytest.mark.parametrize("depth", [0, 2])
def test_the_source_is_closed_when_the_consumer_stops(depth: int) -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from count()
        finally:
            closed.set()

    ahead = prefetch(items(), depth)
    assert next(ahead) == 0
    ahead.close()
    assert closed.is_set()


def test_an_item_that_does_not_come_keeps_nobody_from_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.data.prefetch._PATIENCE", 0.01)
    is_waiting, network_is_back, closed = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        try:
            yield 0
            is_waiting.set()
            network_is_back.wait()
            yield 1
        finally:
            closed.set()

    ahead = prefetch(items(), 1)
    assert next(ahead) == 0
    assert is_waiting.wait(60)
    ahead.close()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert thread.daemon and not closed.is_set()
    network_is_back.set()
    thread.join()
    assert closed.is_set()


def test_dropping_the_generator_stops_the_thread() -> None:
    def consume() -> None:
        for item in prefetch(count(), 2):
            if item == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    ahead = prefetch(count(), 2)
    next(ahead)
    assert workers() == 1
    del ahead
