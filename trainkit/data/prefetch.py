"""Run an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 10.0
"""Seconds."""


def prefetch(iterator: Iterator[T], depth: int) -> Generator[T]:
    """The same items in the same order, up to `depth` of them prepared ahead in a background thread; 0 = no thread.

    An exception of the iterator is raised where its item would have come. When the consumer stops (closes or drops the
    generator, or leaves a loop by an exception) the thread ends after the item in its hands, and the iterator is closed
    there; that is waited for, but not without end. The iterator belongs to the thread from the first item on: do not
    touch it elsewhere.
    """
    if depth == 0:
        yield from iterator
        return
    ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    slots = threading.Semaphore(depth)
    stopped = threading.Event()
    # A daemon, so that a consumer that never closes the generator cannot keep the process from exiting.
    thread = threading.Thread(target=_fill, args=(iterator, ready, slots, stopped), name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            slots.release()
            yield item[0]
    finally:
        stopped.set()
        slots.release()
        # It may be waiting out a trouble of the network, for a step that nobody will take any more.
        thread.join(_PATIENCE)


def _fill(
    iterator: Iterator[T],
    ready: SimpleQueue[tuple[T] | BaseException | None],
    slots: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    """Takes a slot *before* it makes an item, so that never more than `depth` items exist that nobody has taken."""
    try:
        while slots.acquire() and not stopped.is_set():
            try:
                ready.put((next(iterator),))
            except StopIteration:
                break
        ready.put(None)
    except BaseException as error:
        ready.put(error)
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
