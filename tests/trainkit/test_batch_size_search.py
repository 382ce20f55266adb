"""The search finds what brute force finds, with few trials and never a reckless one."""

from __future__ import annotations

import math

from trainkit.batch_size_search import evenly, find_batch_size


def test_it_finds_the_largest_that_fits() -> None:
    for largest in range(1, 40):
        for limit in range(45):
            tried: list[int] = []

            def fits(rows: int, tried: list[int] = tried, limit: int = limit) -> bool:
                tried.append(rows)
                return rows <= limit

            most = max((rows for rows in range(1, largest + 1) if rows <= limit), default=0)
            found = find_batch_size(fits, largest)
            assert found == (evenly(most, largest) if most else 0)
            assert len(tried) == len(set(tried)) <= 2 * math.log2(largest) + 3
            assert all(1 <= rows <= min(largest, max(1, 2 * limit)) for rows in tried)


def test_micro_batches_are_evened_out() -> None:
    for total in range(1, 60):
        for rows in range(1, total + 1):
            even, count = evenly(rows, total), -(-total // rows)
            assert even <= rows and -(-total // even) == count and even * count - total < count
    assert evenly(20, 48) == 16
