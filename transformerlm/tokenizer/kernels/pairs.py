"""Pairs of tokens while merges are learned: found by their tokens in a hash index, by how often they occur in a heap.

A pair is a row of `pairs`, numbered in the order in which they came to be; the index and the heap hold those numbers.

Counts only fall once a pair is in the heap, so an entry may promise too much but never too little: it is corrected when
it comes to the top. Of equally frequent pairs the lexicographically greatest pair of byte strings wins, which makes the
result independent of the order of words.
"""

from __future__ import annotations

from transformerlm.tokenizer.kernels.encoding import HALF, MIX_1
from transformerlm.tokenizer.kernels.machine import Array, as_mask, as_number, inner_kernel, kernel

# Columns of `pairs`, int64.
TOKENS = 0
"""The left token in the upper 32 bits, the right one in the lower."""
COUNT = 1
FIRST = 2
"""Where its list begins in `places`."""
LENGTH = 3

# The numbers in `state`.
MERGES = 0
PAIRS = 1
PLACES = 2
HEAP = 3

LOW_32 = (1 << 32) - 1


# -- pairs by their tokens ---------------------------------------------------------------------------------------------


@inner_kernel
def home(tokens: int, mask: int) -> int:
    value = as_mask(tokens) * MIX_1
    return as_number(value ^ value >> HALF) & mask


@inner_kernel
def find_pair(left: int, right: int, pairs: Array, index: Array) -> int:
    """The number of a pair that exists."""
    mask = index.shape[0] - 1
    slot = home(left << 32 | right, mask)
    while pairs[index[slot], TOKENS] != left << 32 | right:
        slot = slot + 1 & mask
    return index[slot]


@inner_kernel
def add_pair(left: int, right: int, pairs: Array, index: Array, state: Array) -> int:
    """Number a new pair that does not occur yet."""
    pair = state[PAIRS]
    state[PAIRS] += 1
    pairs[pair, TOKENS] = left << 32 | right
    pairs[pair, COUNT] = pairs[pair, LENGTH] = 0
    enter(pair, pairs, index)
    return pair


@inner_kernel
def enter(pair: int, pairs: Array, index: Array) -> None:
    mask = index.shape[0] - 1
    slot = home(pairs[pair, TOKENS], mask)
    while index[slot] >= 0:
        slot = slot + 1 & mask
    index[slot] = pair


@kernel
def enter_all(pairs: Array, index: Array, state: Array) -> None:
    for pair in range(state[PAIRS]):
        enter(pair, pairs, index)


# -- the heap: columns are the count that was true once, and the pair --------------------------------------------------


@inner_kernel
def most_frequent(heap: Array, state: Array, pairs: Array, texts: Array, text_ends: Array) -> int:
    """The pair at the top, once its count there is true; -1 if no pair is left."""
    while state[HEAP] > 0:
        best = heap[0, 1]
        count = pairs[best, COUNT]
        if count == heap[0, 0]:
            return best
        if count > 0:
            heap[0, 0] = count
            sift_down(heap, state[HEAP], pairs, texts, text_ends)
        else:
            drop_top(heap, state, pairs, texts, text_ends)
    return -1


@inner_kernel
def drop_top(heap: Array, state: Array, pairs: Array, texts: Array, text_ends: Array) -> None:
    state[HEAP] -= 1
    heap[0, 0], heap[0, 1] = heap[state[HEAP], 0], heap[state[HEAP], 1]
    sift_down(heap, state[HEAP], pairs, texts, text_ends)


@inner_kernel
def push(heap: Array, state: Array, count: int, pair: int, pairs: Array, texts: Array, text_ends: Array) -> None:
    hole = state[HEAP]
    state[HEAP] += 1
    while hole > 0:
        parent = (hole - 1) >> 1
        if not goes_before(count, pair, heap[parent, 0], heap[parent, 1], pairs, texts, text_ends):
            break
        heap[hole, 0], heap[hole, 1] = heap[parent, 0], heap[parent, 1]
        hole = parent
    heap[hole, 0], heap[hole, 1] = count, pair


@inner_kernel
def sift_down(heap: Array, size: int, pairs: Array, texts: Array, text_ends: Array) -> None:
    """Move the first entry to where it belongs."""
    count, pair = heap[0, 0], heap[0, 1]
    hole = 0
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size and goes_before(
            heap[child + 1, 0], heap[child + 1, 1], heap[child, 0], heap[child, 1], pairs, texts, text_ends
        ):
            child += 1
        if goes_before(count, pair, heap[child, 0], heap[child, 1], pairs, texts, text_ends):
            break
        heap[hole, 0], heap[hole, 1] = heap[child, 0], heap[child, 1]
        hole = child
    heap[hole, 0], heap[hole, 1] = count, pair


@inner_kernel
def goes_before(
    count: int, pair: int, other_count: int, other: int, pairs: Array, texts: Array, text_ends: Array
) -> bool:
    if count != other_count:
        return count > other_count
    tokens, other_tokens = pairs[pair, TOKENS], pairs[other, TOKENS]
    order = compare(tokens >> 32, other_tokens >> 32, texts, text_ends)
    if order == 0:
        order = compare(tokens & LOW_32, other_tokens & LOW_32, texts, text_ends)
    return order > 0


@inner_kernel
def compare(token: int, other: int, texts: Array, text_ends: Array) -> int:
    """Positive if the bytes of `token` are lexicographically greater, negative if less, 0 for the same token."""
    if token == other:
        return 0
    length, other_length = text_ends[token + 1] - text_ends[token], text_ends[other + 1] - text_ends[other]
    for position in range(min(length, other_length)):
        byte, other_byte = texts[text_ends[token] + position], texts[text_ends[other] + position]
        if byte != other_byte:
            return 1 if byte > other_byte else -1
    return length - other_length
