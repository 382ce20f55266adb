"""Learn merges: take the most frequent pair of neighbouring tokens, make it a token, and again.

Each distinct word is there once, with its count, as a chain of *nodes*: one per byte at first, and the node of a token
is that of its first byte. For every pair of tokens we keep how often it occurs (words weighted by their counts) and the
list of nodes where it does. A merge walks down the list of its pair and touches nothing else: at each place it joins
the two nodes, takes the old neighbouring pairs' counts down and the new ones' up.

Lists are written once. A pair can only come to be when the younger of its tokens is made, so all places of a new pair
are known at the end of that merge; later merges may destroy some, which is noticed when the list is used.

For the same reason counts only fall once a pair is in the heap, so an entry may promise too much but never too little:
it is corrected when it comes to the top. Of equally frequent pairs the lexicographically greatest pair of byte strings
wins, which makes the result independent of the order of words.

Kernels cannot make an array larger for their caller: `learn` stops before a merge that could need more room than there
is, and says what for.
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer.kernels.encoding import HALF, MIX_1
from transformerlm.tokenizer.kernels.machine import Array, as_mask, as_number, kernel

# Columns of `nodes`, int32.
TOKEN = 0
NEXT = 1
PREVIOUS = 2
WORD = 3
END = -1
CONSUMED = -1

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

# What `learn` lacks when it comes back.
DONE = 0
NEEDS_PAIRS = 1
NEEDS_PLACES = 2
NEEDS_TEXTS = 3
NEEDS_LOG = 4

LOW_32 = (1 << 32) - 1


@kernel
def start(nodes: Array, counts: Array, pairs: Array, index: Array, places: Array, state: Array) -> None:
    """Count all pairs of bytes and list where they are."""
    number_of = np.full(1 << 16, -1, np.int32)
    for node in range(nodes.shape[0]):
        following = nodes[node, NEXT]
        if following != END:
            tokens = nodes[node, TOKEN] << 8 | nodes[following, TOKEN]
            if number_of[tokens] < 0:
                number_of[tokens] = add_pair(nodes[node, TOKEN], nodes[following, TOKEN], pairs, index, state)
            pairs[number_of[tokens], COUNT] += counts[nodes[node, WORD]]
            pairs[number_of[tokens], LENGTH] += 1
    place_lists(0, pairs, state)
    for node in range(nodes.shape[0]):
        following = nodes[node, NEXT]
        if following != END:
            pair = number_of[nodes[node, TOKEN] << 8 | nodes[following, TOKEN]]
            places[pairs[pair, FIRST] + pairs[pair, LENGTH]] = node
            pairs[pair, LENGTH] += 1


@kernel
def fill_heap(pairs: Array, heap: Array, state: Array, texts: Array, text_ends: Array) -> None:
    for pair in range(state[PAIRS]):
        push(heap, state, pairs[pair, COUNT], pair, pairs, texts, text_ends)


@kernel
def learn(
    until: int,
    nodes: Array,
    counts: Array,
    pairs: Array,
    index: Array,
    places: Array,
    heap: Array,
    log: Array,
    left_pair: Array,
    right_pair: Array,
    texts: Array,
    text_ends: Array,
    merges: Array,
    state: Array,
) -> int:
    """Learn merges until there are `until` of them, or no pair is left."""
    while state[MERGES] < until and state[HEAP] > 0:
        best = heap[0, 1]
        if pairs[best, COUNT] != heap[0, 0]:
            if pairs[best, COUNT] > 0:
                heap[0, 0] = pairs[best, COUNT]
            else:
                state[HEAP] -= 1
                heap[0] = heap[state[HEAP]]
            sift_down(heap, state[HEAP], pairs, texts, text_ends)
            continue

        left, right = pairs[best, TOKENS] >> 32, pairs[best, TOKENS] & LOW_32
        token = 256 + state[MERGES]
        size = text_ends[left + 1] - text_ends[left] + text_ends[right + 1] - text_ends[right]
        most_new = min(2 * pairs[best, LENGTH], 2 * (token + 1))
        if state[PAIRS] + most_new > pairs.shape[0] or 2 * (state[PAIRS] + most_new) > index.shape[0]:
            return NEEDS_PAIRS
        if state[PLACES] + 2 * pairs[best, LENGTH] > places.shape[0]:
            return NEEDS_PLACES
        if text_ends[token] + size > texts.shape[0]:
            return NEEDS_TEXTS
        if 2 * pairs[best, LENGTH] > log.shape[0]:
            return NEEDS_LOG

        state[HEAP] -= 1
        heap[0] = heap[state[HEAP]]
        sift_down(heap, state[HEAP], pairs, texts, text_ends)
        merges[state[MERGES], 0], merges[state[MERGES], 1] = left, right
        state[MERGES] += 1
        append_text(left, right, token, texts, text_ends)

        first_new = state[PAIRS]
        logged = 0
        for item in range(pairs[best, FIRST], pairs[best, FIRST] + pairs[best, LENGTH]):
            node = np.int64(places[item])
            partner = np.int64(nodes[node, NEXT])
            # Outdated when another merge has taken one of the two.
            if nodes[node, TOKEN] != left or partner == END or nodes[partner, TOKEN] != right:
                continue
            count = counts[nodes[node, WORD]]
            before, after = np.int64(nodes[node, PREVIOUS]), np.int64(nodes[partner, NEXT])
            if before != END:
                neighbour = np.int64(nodes[before, TOKEN])
                pairs[find_pair(neighbour, left, pairs, index), COUNT] -= count
                pair = np.int64(left_pair[neighbour])
                if pair < 0:
                    pair = add_pair(neighbour, token, pairs, index, state)
                    left_pair[neighbour] = pair
                    if neighbour == token:
                        right_pair[token] = pair
                pairs[pair, COUNT] += count
                pairs[pair, LENGTH] += 1
                log[logged, 0], log[logged, 1] = pair, before
                logged += 1
            if after != END:
                neighbour = np.int64(nodes[after, TOKEN])
                pairs[find_pair(right, neighbour, pairs, index), COUNT] -= count
                pair = np.int64(right_pair[neighbour])
                if pair < 0:
                    pair = add_pair(token, neighbour, pairs, index, state)
                    right_pair[neighbour] = pair
                pairs[pair, COUNT] += count
                pairs[pair, LENGTH] += 1
                log[logged, 0], log[logged, 1] = pair, node
                logged += 1
                nodes[after, PREVIOUS] = node
            nodes[node, TOKEN], nodes[node, NEXT] = token, after
            nodes[partner, TOKEN] = CONSUMED
        pairs[best, COUNT] = 0

        place_lists(first_new, pairs, state)
        for item in range(logged):
            pair = np.int64(log[item, 0])
            places[pairs[pair, FIRST] + pairs[pair, LENGTH]] = log[item, 1]
            pairs[pair, LENGTH] += 1
        for pair in range(first_new, state[PAIRS]):
            left_pair[pairs[pair, TOKENS] >> 32] = right_pair[pairs[pair, TOKENS] >> 32] = -1
            left_pair[pairs[pair, TOKENS] & LOW_32] = right_pair[pairs[pair, TOKENS] & LOW_32] = -1
            if pairs[pair, COUNT] > 0:
                push(heap, state, pairs[pair, COUNT], pair, pairs, texts, text_ends)
    return DONE


@kernel
def place_lists(first: int, pairs: Array, state: Array) -> None:
    """Reserve a list of the right length for each pair from `first` on, and make its length 0 to fill it."""
    for pair in range(first, state[PAIRS]):
        pairs[pair, FIRST] = state[PLACES]
        state[PLACES] += pairs[pair, LENGTH]
        pairs[pair, LENGTH] = 0


@kernel
def append_text(left: int, right: int, token: int, texts: Array, text_ends: Array) -> None:
    end = text_ends[token]
    for part in (left, right):
        for position in range(text_ends[part], text_ends[part + 1]):
            texts[end] = texts[position]
            end += 1
    text_ends[token + 1] = end


# -- pairs by their tokens ---------------------------------------------------------------------------------------------


@kernel
def home(tokens: int, mask: int) -> int:
    value = as_mask(tokens) * MIX_1
    return as_number(value ^ value >> HALF) & mask


@kernel
def find_pair(left: int, right: int, pairs: Array, index: Array) -> int:
    """The number of a pair that exists."""
    mask = index.shape[0] - 1
    slot = home(left << 32 | right, mask)
    while pairs[index[slot], TOKENS] != left << 32 | right:
        slot = slot + 1 & mask
    return index[slot]


@kernel
def add_pair(left: int, right: int, pairs: Array, index: Array, state: Array) -> int:
    """Number a new pair that does not occur yet."""
    pair = state[PAIRS]
    state[PAIRS] += 1
    pairs[pair, TOKENS] = left << 32 | right
    pairs[pair, COUNT] = pairs[pair, LENGTH] = 0
    enter(pair, pairs, index)
    return pair


@kernel
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


@kernel
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


@kernel
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


@kernel
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


@kernel
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
