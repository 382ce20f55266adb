"""How often each pre-token occurs, in the hash table of `encoding.py` with other contents.

A slot holds the key in words 0 and 1, where the bytes of a long pre-token lie in the arena in word 2, and the count in
word 3.
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer.kernels.encoding import (
    ARENA_USED,
    BYTE,
    DONE,
    FREE,
    LENGTH_SHIFT,
    NEEDS_ARENA,
    NEEDS_SLOTS,
    SHORT,
    SLOTS_USED,
    copy_text,
    find_slot,
    long_key,
    prepare_batch,
)
from transformerlm.tokenizer.kernels.machine import (
    ZERO,
    Array,
    as_mask,
    as_number,
    inner_kernel,
    kernel,
    load_word,
    store_word,
)
from transformerlm.tokenizer.kernels.patterns import scan
from transformerlm.tokenizer.kernels.scanning import MAX_STARTS

LONG_LENGTH = np.uint64((1 << 56) - 1)
LONGEST_WORD = 1 << 31


@inner_kernel
def length_of(high: np.uint64) -> int:
    """How many bytes a pre-token has, from the second word of its key."""
    length = as_number(high >> LENGTH_SHIFT)
    return length if length <= SHORT else as_number(high & LONG_LENGTH)


@kernel
def count_words(
    text: int,
    segments: Array,
    pattern: int,
    weights: Array,
    classes: Array,
    slots: Array,
    arena_array: Array,
    used: Array,
    progress: Array,
) -> int:
    """Count each pre-token of segment i `weights[i]` times. `progress`: the segment to go on with, the place in it."""
    starts = np.empty(MAX_STARTS + 16, np.int64)
    keys = np.empty((MAX_STARTS, 3), np.uint64)
    arena = arena_array.ctypes.data
    status = DONE
    number, place = progress[0], progress[1]
    while number < segments.shape[0] and status == DONE:
        end = segments[number, 1]
        weight = as_mask(weights[number])
        while place < end and status == DONE:
            count = scan(pattern, text, place, end, classes, starts)
            if 2 * (used[SLOTS_USED] + count) > slots.shape[0]:
                status = NEEDS_SLOTS
                break
            prepare_batch(text, starts, count, slots, keys)
            place = starts[count - 1]
            for index in range(count - 1):
                low, high = keys[index, 0], keys[index, 1]
                home = as_number(keys[index, 2])
                if (load_word(home) ^ low) | (load_word(home + 8) ^ high) == ZERO:
                    store_word(home + 24, load_word(home + 24) + weight)
                    continue
                begin = starts[index]
                length = starts[index + 1] - begin
                if length > SHORT:
                    if used[ARENA_USED] + length + 16 > arena_array.shape[0]:
                        status = NEEDS_ARENA
                        place = begin
                        break
                    low, high = long_key(text + begin, length)
                slot = find_slot(slots, arena, low, high, text + begin, length)
                if slots[slot, 1] == FREE:
                    slots[slot, 0], slots[slot, 1] = low, high
                    used[SLOTS_USED] += 1
                    if length > SHORT:
                        slots[slot, 2] = as_mask(used[ARENA_USED])
                        copy_text(arena + used[ARENA_USED], text + begin, length)
                        used[ARENA_USED] += length + 7 & ~7
                slots[slot, 3] += weight
        if status == DONE:
            number += 1
            if number < segments.shape[0]:
                place = segments[number, 0]
    progress[0], progress[1] = number, place
    return status


@kernel
def add_counts(
    other_slots: Array,
    other_arena: int,
    smallest: int,
    slots: Array,
    arena_array: Array,
    used: Array,
    progress: Array,
) -> int:
    """Add the counts of another table, of those words that it has at least `smallest` times."""
    arena = arena_array.ctypes.data
    while progress[0] < other_slots.shape[0]:
        low, high, record, count = other_slots[progress[0]]
        if high != FREE and count >= as_mask(smallest):
            length = length_of(high)
            if 2 * used[SLOTS_USED] >= slots.shape[0]:
                return NEEDS_SLOTS
            if length > SHORT and used[ARENA_USED] + length + 16 > arena_array.shape[0]:
                return NEEDS_ARENA
            place = other_arena + as_number(record)
            slot = find_slot(slots, arena, low, high, place, length)
            if slots[slot, 1] == FREE:
                slots[slot, 0], slots[slot, 1] = low, high
                used[SLOTS_USED] += 1
                if length > SHORT:
                    slots[slot, 2] = as_mask(used[ARENA_USED])
                    copy_text(arena + used[ARENA_USED], place, length)
                    used[ARENA_USED] += length + 7 & ~7
            slots[slot, 3] += count
        progress[0] += 1
    return DONE


@kernel
def total_length(slots: Array) -> int:
    """How many bytes all words have together."""
    total = 0
    for slot in range(slots.shape[0]):
        if slots[slot, 1] != FREE:
            total += length_of(slots[slot, 1])
    return total


@kernel
def write_nodes(slots: Array, arena: int, nodes: Array, counts: Array) -> None:
    """Lay out the words of the table for `learning.py`, a node for each byte."""
    node = word = 0
    for slot in range(slots.shape[0]):
        low, high, record, count = slots[slot]
        if high == FREE:
            continue
        length = length_of(high)
        for index in range(length):
            if length > SHORT:
                shifted = load_word(arena + as_number(record) + index)
            elif index < 8:
                shifted = low >> BYTE * as_mask(index)
            else:
                shifted = high >> BYTE * as_mask(index - 8)
            nodes[node, 0] = as_number(shifted) & 0xFF
            nodes[node, 1] = node + 1 if index + 1 < length else -1
            nodes[node, 2] = node - 1 if index > 0 else -1
            nodes[node, 3] = word
            node += 1
        counts[word] = as_number(count)
        word += 1
