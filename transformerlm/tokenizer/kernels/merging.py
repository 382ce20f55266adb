"""The ids of a new pre-token: find the pair of neighbours with the lowest rank, join it, and again.

Tokens have numbers of their own here: the bytes by value, then what merges make, in the order of merges. Ranks of pairs
are looked up in a hash table, and for two bytes in an array.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from transformerlm.tokenizer.kernels.machine import (
    ALL_BITS,
    HALF,
    MIX_1,
    Array,
    as_mask,
    as_number,
    inner_kernel,
    kernel,
    load_byte,
    store_16,
    store_32,
)

NO_MERGE = 1 << 30
RANK_BITS = np.uint64(21)
RANK_MASK = np.uint64((1 << 21) - 1)
MAX_TOKENS = 1 << 21
"""Two tokens and a rank fit into 63 bits."""

MERGE_BY_SEARCH = 64
"""Up to so many bytes the best pair is searched anew after each merge; beyond, a heap keeps the work at O(n log n)."""


class Merges(NamedTuple):
    byte_pairs: Array
    """`int32 [65536]`: rank of the merge of two bytes."""
    pairs: Array
    """`uint64 [capacity]`: hash table of tokens left and right, and rank."""
    made: Array
    """`int32 [merges]`: the token that a merge makes."""
    id_of_token: Array
    """`int64 [tokens]`."""


@kernel
def fill_pairs(lefts: Array, rights: Array, pairs: Array) -> None:
    """Enter each merge into the hash table `pairs`, whose words are left token, right token, rank from high to low."""
    mask = pairs.shape[0] - 1
    for rank in range(lefts.shape[0]):
        key = as_mask(lefts[rank]) << RANK_BITS | as_mask(rights[rank])
        number = as_number(key * MIX_1 >> HALF) & mask
        while pairs[number] != ALL_BITS:
            number = number + 1 & mask
        pairs[number] = key << RANK_BITS | as_mask(rank)


@inner_kernel
def rank_of(pairs: Array, left: int, right: int) -> int:
    """The rank of the merge of two tokens; `NO_MERGE` if there is none."""
    mask = pairs.shape[0] - 1
    key = as_mask(left) << RANK_BITS | as_mask(right)
    number = as_number(key * MIX_1 >> HALF) & mask
    while pairs[number] != ALL_BITS:
        if pairs[number] >> RANK_BITS == key:
            return as_number(pairs[number] & RANK_MASK)
        number = number + 1 & mask
    return NO_MERGE


@inner_kernel
def merge(place: int, length: int, merges: Merges, tokens: Array, ranks: Array, target: int, id_bytes: int) -> int:
    """Write the ids of the bytes at `place` to `target` and return how many; `tokens` and `ranks` are to work in."""
    if length > MERGE_BY_SEARCH:
        return merge_by_heap(place, length, merges, target, id_bytes)
    count = merge_by_search(place, length, merges, tokens, ranks)
    write_ids(tokens, count, merges.id_of_token, target, id_bytes)
    return count


@inner_kernel
def merge_by_search(
    place: int,
    length: int,
    merges: Merges,
    tokens: Array,
    ranks: Array,
) -> int:
    """Merge the bytes at `place` into `tokens` and return how many are left. `ranks[i]`: of the tokens i and i + 1."""
    last = length - 1
    best, best_rank = 0, NO_MERGE
    tokens[0] = load_byte(place)
    for index in range(last):
        tokens[index + 1] = load_byte(place + index + 1)
        rank = merges.byte_pairs[tokens[index] << 8 | tokens[index + 1]]
        ranks[index] = rank
        if rank < best_rank:
            best, best_rank = index, rank
    while best_rank < NO_MERGE:
        tokens[best] = merges.made[best_rank]
        last -= 1
        for index in range(best + 1, last + 1):
            tokens[index] = tokens[index + 1]
            ranks[index - 1] = ranks[index]
        if best > 0:
            ranks[best - 1] = rank_of(merges.pairs, tokens[best - 1], tokens[best])
        if best < last:
            ranks[best] = rank_of(merges.pairs, tokens[best], tokens[best + 1])
        best_rank = NO_MERGE
        for index in range(last):
            if ranks[index] < best_rank:
                best, best_rank = index, ranks[index]
    return last + 1


@kernel
def merge_by_heap(place: int, length: int, merges: Merges, target: int, id_bytes: int) -> int:
    """`merge` for any length. Candidates wait in a heap as rank and position; neighbours are linked by position."""
    tokens = np.empty(length, np.int64)
    after = np.empty(length, np.int64)
    before = np.empty(length, np.int64)
    heap = np.empty(3 * length, np.int64)  # a merge removes a token and proposes two pairs
    size = 0
    for index in range(length):
        tokens[index] = load_byte(place + index)
        after[index] = index + 1
        before[index] = index - 1
    for index in range(length - 1):
        size = push(heap, size, rank_of(merges.pairs, tokens[index], tokens[index + 1]), index)
    while size:
        rank, left = heap[0] >> 32, heap[0] & 0xFFFF_FFFF
        size = pop(heap, size)
        right = after[left]
        # Outdated when an earlier merge has taken one of the two.
        if tokens[left] < 0 or right == length or rank_of(merges.pairs, tokens[left], tokens[right]) != rank:
            continue
        tokens[left], tokens[right] = merges.made[rank], -1
        following = after[left] = after[right]
        if following < length:
            before[following] = left
            size = push(heap, size, rank_of(merges.pairs, tokens[left], tokens[following]), left)
        if before[left] >= 0:
            size = push(heap, size, rank_of(merges.pairs, tokens[before[left]], tokens[left]), before[left])
    count = 0
    index = 0
    while index < length:
        tokens[count] = tokens[index]
        count += 1
        index = after[index]
    write_ids(tokens, count, merges.id_of_token, target, id_bytes)
    return count


@inner_kernel
def write_ids(tokens: Array, count: int, id_of_token: Array, target: int, id_bytes: int) -> None:
    if id_bytes == 2:
        for index in range(count):
            store_16(target + 2 * index, id_of_token[tokens[index]])
    else:
        for index in range(count):
            store_32(target + 4 * index, id_of_token[tokens[index]])


@inner_kernel
def push(heap: Array, size: int, rank: int, position: int) -> int:
    if rank == NO_MERGE:
        return size
    item = rank << 32 | position
    hole = size
    while hole > 0 and heap[(hole - 1) >> 1] > item:
        heap[hole] = heap[(hole - 1) >> 1]
        hole = (hole - 1) >> 1
    heap[hole] = item
    return size + 1


@inner_kernel
def pop(heap: Array, size: int) -> int:
    size -= 1
    item = heap[size]
    hole = 0
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = item
    return size
