"""Learn merges: take the most frequent pair of neighbouring tokens, make it a token, and again.

Each distinct word is there once, with its count, as a chain of *nodes*: one per byte at first, and the node of a token
is that of its first byte. For every pair of tokens we keep how often it occurs (words weighted by their counts) and the
list of nodes where it does. A merge walks down the list of its pair and touches nothing else: at each place it joins
the two nodes, takes the old neighbouring pairs' counts down and the new ones' up.

Lists are written once. A pair can only come to be when the younger of its tokens is made, so all places of a new pair
are known at the end of that merge; later merges may destroy some, which is noticed when the list is used.

`pairs.py` keeps the pairs: found by their two tokens, and by how often they occur.

Kernels cannot make an array larger for their caller: `learn` stops before a merge that could need more room than there
is, and says what for.
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer.kernels.machine import Array, inner_kernel, kernel, prefetch
from transformerlm.tokenizer.kernels.pairs import (
    COUNT,
    FIRST,
    LENGTH,
    LOW_32,
    MERGES,
    PAIRS,
    PLACES,
    TOKENS,
    add_pair,
    drop_top,
    find_pair,
    most_frequent,
    push,
)

# Columns of `nodes`, int32.
TOKEN = 0
NEXT = 1
PREVIOUS = 2
WORD = 3
END = -1
CONSUMED = -1

# What `learn` lacks when it comes back.
DONE = 0
NEEDS_PAIRS = 1
NEEDS_PLACES = 2
NEEDS_TEXTS = 3
NEEDS_LOG = 4

NODE_BYTES = 16
AHEAD = 16
"""Places between the one that is worked on and the one whose node is asked for: nodes lie far apart in memory."""


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
    while state[MERGES] < until:
        best = most_frequent(heap, state, pairs, texts, text_ends)
        if best < 0:
            return DONE
        left, right = pairs[best, TOKENS] >> 32, pairs[best, TOKENS] & LOW_32
        token = 256 + state[MERGES]
        lacking = what_lacks(best, token, pairs, index, places, log, texts, text_ends, state)
        if lacking != DONE:
            return lacking
        drop_top(heap, state, pairs, texts, text_ends)
        merges[state[MERGES], 0], merges[state[MERGES], 1] = left, right
        state[MERGES] += 1
        append_text(left, right, token, texts, text_ends)
        first_new = state[PAIRS]
        logged = join_everywhere(best, token, nodes, counts, pairs, index, places, log, left_pair, right_pair, state)
        write_lists(first_new, logged, pairs, places, log, state)
        for pair in range(first_new, state[PAIRS]):
            forget(pair, pairs, left_pair, right_pair)
            if pairs[pair, COUNT] > 0:
                push(heap, state, pairs[pair, COUNT], pair, pairs, texts, text_ends)
    return DONE


@inner_kernel
def what_lacks(
    best: int,
    token: int,
    pairs: Array,
    index: Array,
    places: Array,
    log: Array,
    texts: Array,
    text_ends: Array,
    state: Array,
) -> int:
    """What merging the pair `best` may need more of than there is; `DONE` if nothing."""
    left, right = pairs[best, TOKENS] >> 32, pairs[best, TOKENS] & LOW_32
    most_places = pairs[best, LENGTH]
    most_pairs = state[PAIRS] + min(2 * most_places, 2 * (token + 1))
    size = text_ends[left + 1] - text_ends[left] + text_ends[right + 1] - text_ends[right]
    if most_pairs > pairs.shape[0] or 2 * most_pairs > index.shape[0]:
        return NEEDS_PAIRS
    if state[PLACES] + 2 * most_places > places.shape[0]:
        return NEEDS_PLACES
    if text_ends[token] + size > texts.shape[0]:
        return NEEDS_TEXTS
    return NEEDS_LOG if 2 * most_places > log.shape[0] else DONE


@inner_kernel
def join_everywhere(
    best: int,
    token: int,
    nodes: Array,
    counts: Array,
    pairs: Array,
    index: Array,
    places: Array,
    log: Array,
    left_pair: Array,
    right_pair: Array,
    state: Array,
) -> int:
    """Make the pair `best` into `token` wherever it is, and keep counts; returns how many new places are in `log`."""
    left, right = pairs[best, TOKENS] >> 32, pairs[best, TOKENS] & LOW_32
    logged = 0
    end = pairs[best, FIRST] + pairs[best, LENGTH]
    for item in range(pairs[best, FIRST], end):
        prefetch(nodes.ctypes.data + NODE_BYTES * np.int64(places[min(item + AHEAD, end - 1)]))
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
            pair = pair_with_left(neighbour, token, pairs, index, left_pair, right_pair, state)
            logged = note_place(pair, before, count, pairs, log, logged)
        if after != END:
            neighbour = np.int64(nodes[after, TOKEN])
            pairs[find_pair(right, neighbour, pairs, index), COUNT] -= count
            pair = pair_with_right(neighbour, token, pairs, index, right_pair, state)
            logged = note_place(pair, node, count, pairs, log, logged)
            nodes[after, PREVIOUS] = node
        nodes[node, TOKEN], nodes[node, NEXT] = token, after
        nodes[partner, TOKEN] = CONSUMED
    pairs[best, COUNT] = 0
    return logged


@inner_kernel
def pair_with_left(
    neighbour: int, token: int, pairs: Array, index: Array, left_pair: Array, right_pair: Array, state: Array
) -> int:
    """The pair of `neighbour` and the token that is being made, new if this is its first place."""
    pair = left_pair[neighbour]
    if pair < 0:
        pair = add_pair(neighbour, token, pairs, index, state)
        left_pair[neighbour] = pair
        if neighbour == token:  # beside itself, it is on both sides
            right_pair[token] = pair
    return pair


@inner_kernel
def pair_with_right(neighbour: int, token: int, pairs: Array, index: Array, right_pair: Array, state: Array) -> int:
    pair = right_pair[neighbour]
    if pair < 0:
        pair = add_pair(token, neighbour, pairs, index, state)
        right_pair[neighbour] = pair
    return pair


@inner_kernel
def forget(pair: int, pairs: Array, left_pair: Array, right_pair: Array) -> None:
    """Clear the tables of `pair_with_left` and `pair_with_right` for the next token."""
    left, right = pairs[pair, TOKENS] >> 32, pairs[pair, TOKENS] & LOW_32
    left_pair[left] = right_pair[left] = -1
    left_pair[right] = right_pair[right] = -1


@inner_kernel
def note_place(pair: int, node: int, count: int, pairs: Array, log: Array, logged: int) -> int:
    """Count one more place of a new pair; which pair and where goes to `log`, until all are known."""
    pairs[pair, COUNT] += count
    pairs[pair, LENGTH] += 1
    log[logged, 0], log[logged, 1] = pair, node
    return logged + 1


@inner_kernel
def write_lists(first: int, logged: int, pairs: Array, places: Array, log: Array, state: Array) -> None:
    """The lists of the pairs from `first` on, from the log."""
    place_lists(first, pairs, state)
    for item in range(logged):
        pair = np.int64(log[item, 0])
        places[pairs[pair, FIRST] + pairs[pair, LENGTH]] = log[item, 1]
        pairs[pair, LENGTH] += 1


@inner_kernel
def place_lists(first: int, pairs: Array, state: Array) -> None:
    """Reserve a list of the right length for each pair from `first` on, and make its length 0 to fill it."""
    for pair in range(first, state[PAIRS]):
        pairs[pair, FIRST] = state[PLACES]
        state[PLACES] += pairs[pair, LENGTH]
        pairs[pair, LENGTH] = 0


@inner_kernel
def append_text(left: int, right: int, token: int, texts: Array, text_ends: Array) -> None:
    end = text_ends[token]
    for part in (left, right):
        for position in range(text_ends[part], text_ends[part + 1]):
            texts[end] = texts[position]
            end += 1
    text_ends[token + 1] = end
