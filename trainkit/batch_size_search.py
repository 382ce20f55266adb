"""The largest micro-batch that fits: doubling, then bisection, over a trial that somebody else makes."""

from __future__ import annotations

from collections.abc import Callable


def find_batch_size(fits: Callable[[int], bool], largest: int) -> int:
    """The most rows of a micro-batch, at most `largest` (a rank's rows of one step); 0 where not even one row fits.

    Takes it that what fits fits with fewer rows too; about 2·log2 of the result trials. The result is then lowered as
    far as a step still takes the same number of micro-batches: so they are as full as can be.
    """
    assert largest >= 1
    good, bad = 0, largest + 1
    rows = 1
    while good < largest and rows < bad:
        if not fits(rows):
            bad = rows
            break
        good, rows = rows, min(2 * rows, largest)
    while bad - good > 1 and bad <= largest:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return evenly(good, largest) if good else 0


def evenly(rows: int, total: int) -> int:
    """The fewest rows with which `total` make no more micro-batches than with `rows`."""
    micro_batches = -(-total // rows)
    return -(-total // micro_batches)
