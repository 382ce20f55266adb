"""Byte-pair encoding of one pre-token (arXiv:1508.07909): merge the best pair of neighbours until none is left."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from typing import TypeAlias

MergeTable: TypeAlias = Mapping[tuple[int, int], tuple[int, int]]
"""`{(left id, right id): (rank, merged id)}`; the lowest rank merges first."""

CONSUMED = -1


def merge(symbols: list[int], merges: MergeTable) -> list[int]:
    """Merge the pair of lowest rank, the leftmost of equals, until no neighbours have a merge; `symbols` is used up.

    Neighbours are linked by position and candidates wait in a heap, so a run of n symbols takes O(n log n) steps: text
    without spaces (a line of dashes, base64, DNA) is one pre-token and can be megabytes long.
    """
    size = len(symbols)
    after = list(range(1, size + 1))  # position of the next symbol still alive; `size` ends the list
    before = list(range(-1, size - 1))
    candidates: list[tuple[int, int, int, int, int]] = []  # rank, position, left, right, merged

    def propose(position: int, partner: int) -> None:
        left, right = symbols[position], symbols[partner]
        if (left, right) in merges:
            rank, merged = merges[left, right]
            heappush(candidates, (rank, position, left, right, merged))

    for position in range(size - 1):
        propose(position, position + 1)
    while candidates:
        _, position, left, right, merged = heappop(candidates)
        partner = after[position]
        # Outdated when an earlier merge has taken one of the two.
        if partner == size or symbols[position] != left or symbols[partner] != right:
            continue
        symbols[position], symbols[partner] = merged, CONSUMED
        following = after[position] = after[partner]
        if following < size:
            before[following] = position
            propose(position, following)
        if before[position] >= 0:
            propose(before[position], position)
    return [symbol for symbol in symbols if symbol != CONSUMED]
