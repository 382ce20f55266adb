"""Ids of pre-tokens: remembered in a hash table, made by merging when one is new.

**The table** has slots of four words (32 bytes, half a cache line) in open addressing with linear probing. A slot holds
a pre-token and its ids:

    word 0, 1   key: the bytes themselves, zero-filled, up to 15 of them; the highest byte is their number
    word 2, 3   the ids, as they are written to the output; the highest lane holds their size in bytes

So one look-up is: compare two words, copy 16 bytes to the output, and move on by the size; the lane with the size, and
whatever lies behind the ids, is overwritten by what comes next. This is most of the work, and it is done for a whole
batch of pre-tokens in two loops: the first computes keys and asks for the slots' cache lines, the second finds them
there.

A pre-token of more than 15 bytes, or with more ids than a slot has lanes (7 of 16 bits, 3 of 32), keeps what does not
fit in the *arena*, a byte buffer: its bytes where they are no key, then its ids. In the slot of such a pre-token the
key says so (`LONG`, `SPILLED`), words 2 and 3 are the place in the arena and the ids' size. A `LONG` key is a hash, and
the bytes are compared.

A pre-token that has no slot is merged (`merging.py`) and gets one.

Kernels cannot make an array larger for their caller. They stop between two pre-tokens and return what they lack; the
caller sees to it (`compiled_encoder.py`), and the kernel goes on where it stopped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from transformerlm.tokenizer.kernels.machine import (
    ALL_BITS,
    HALF,
    MIX_1,
    MIX_2,
    ZERO,
    Array,
    as_mask,
    as_number,
    copy_16_bytes,
    count_bits,
    inner_kernel,
    kernel,
    load_word,
    low_bits,
    prefetch,
    store_word,
)
from transformerlm.tokenizer.kernels.merging import MERGE_BY_SEARCH, Merges, merge
from transformerlm.tokenizer.kernels.patterns import scan
from transformerlm.tokenizer.kernels.scanning import MAX_STARTS

# Why a kernel came back.
DONE = 0
NEEDS_SLOTS = 1
NEEDS_ARENA = 2
NEEDS_OUTPUT = 3

SLOT_BYTES = 32
SHORT = 15
"""Bytes that fit into a key."""
LENGTH_SHIFT = np.uint64(56)
SPILLED = np.uint64(1 << 63)
LONG = np.uint64(0xFF << 56)
FREE = ZERO

SLOTS_USED = 0
ARENA_USED = 1

BYTE = np.uint64(8)

LONGEST_REMEMBERED = 512
"""Longer pre-tokens hardly ever repeat."""
OUTPUT_MARGIN = 64
"""Bytes kept free at the end of the output: a look-up writes 16 at once."""


# -- the table ---------------------------------------------------------------------------------------------------------


@inner_kernel
def mixed(low: np.uint64, high: np.uint64) -> np.uint64:
    """A hash of a key; its high bits choose the slot."""
    value = low ^ high * MIX_2
    return (value ^ value >> HALF) * MIX_1


@inner_kernel
def short_key(place: int, length: int) -> tuple[np.uint64, np.uint64]:
    """The key of the `length` bytes at the address `place`, if that is up to `SHORT`; else one that no slot has."""
    if length <= 8:
        low = load_word(place) & ALL_BITS >> as_mask(64 - 8 * length)
        return low, as_mask(length) << LENGTH_SHIFT
    if length <= SHORT:
        high = load_word(place + 8) & ALL_BITS >> as_mask(128 - 8 * length)
        return load_word(place), high | as_mask(length) << LENGTH_SHIFT
    return ZERO, LONG


@inner_kernel
def long_key(place: int, length: int) -> tuple[np.uint64, np.uint64]:
    value = as_mask(length) * MIX_1
    for offset in range(0, length - 7, 8):
        value = (value ^ load_word(place + offset)) * MIX_2
        value ^= value >> HALF
    rest = length & 7
    if rest:
        value = (value ^ load_word(place + length - rest) & low_bits(8 * rest)) * MIX_2
        value ^= value >> HALF
    return value, LONG | as_mask(length)


@inner_kernel
def equal_text(one: int, other: int, length: int) -> bool:
    for offset in range(0, length - 7, 8):
        if load_word(one + offset) != load_word(other + offset):
            return False
    rest = length & 7
    return rest == 0 or (load_word(one + length - rest) ^ load_word(other + length - rest)) & low_bits(8 * rest) == ZERO


@inner_kernel
def find_slot(slots: Array, arena: int, low: np.uint64, high: np.uint64, place: int, length: int) -> int:
    """The number of the slot that holds the pre-token at `place`, or of the free slot where it belongs."""
    capacity = slots.shape[0]
    number = as_number(mixed(low, high) >> as_mask(64 - count_bits(as_mask(capacity - 1))))
    while slots[number, 1] != FREE:
        same_key = slots[number, 0] == low and slots[number, 1] & ~SPILLED == high & ~SPILLED
        if same_key and (length <= SHORT or equal_text(arena + as_number(slots[number, 2]), place, length)):
            return number
        number = number + 1 & capacity - 1
    return number


@kernel
def rehash(old: Array, new: Array) -> None:
    """Move every entry of `old` into the larger `new`, which is all zero."""
    capacity = new.shape[0]
    shift = as_mask(64 - count_bits(as_mask(capacity - 1)))
    for entry in range(old.shape[0]):
        low, high = old[entry, 0], old[entry, 1]
        if high != FREE:
            if high < LONG:
                high &= ~SPILLED
            number = as_number(mixed(low, high) >> shift)
            while new[number, 1] != FREE:
                number = number + 1 & capacity - 1
            for word in range(4):
                new[number, word] = old[entry, word]


# -- encoding ----------------------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """The pre-tokens seen, and their ids."""

    slots: Array
    """`uint64 [capacity, 4]`, a power of two."""
    arena: Array
    """`uint8`."""
    used: Array
    """`int64 [2]`: how many slots, and how many bytes of the arena."""


@inner_kernel
def prepare_batch(text: int, starts: Array, count: int, slots: Array, keys: Array) -> None:
    """The key and the address of the slot of each pre-token; and their cache lines are on the way."""
    shift = as_mask(64 - count_bits(as_mask(slots.shape[0] - 1)))
    table = slots.ctypes.data
    begin = starts[0]
    for index in range(count - 1):
        end = starts[index + 1]
        low, high = short_key(text + begin, end - begin)
        slot = table + SLOT_BYTES * as_number(mixed(low, high) >> shift)
        keys[index, 0] = low
        keys[index, 1] = high
        keys[index, 2] = as_mask(slot)
        prefetch(slot)
        begin = end


@inner_kernel
def emit_known(keys: Array, index: int, count: int, target: int, size_shift: np.uint64) -> tuple[int, int]:
    """Write ids until a pre-token is not in the first slot where it may be; returns its index and the new target."""
    while index < count:
        slot = as_number(keys[index, 2])
        if (load_word(slot) ^ keys[index, 0]) | (load_word(slot + 8) ^ keys[index, 1]) != ZERO:
            break
        copy_16_bytes(target, slot + 16)
        target += as_number(load_word(slot + 24) >> size_shift)
        index += 1
    return index, target


@inner_kernel
def emit_from(slot: int, arena: int, length: int, target: int, size_shift: np.uint64) -> int:
    """Write the ids that the slot at the address `slot` has for a pre-token of `length` bytes; the new target."""
    if load_word(slot + 8) & SPILLED == ZERO:
        copy_16_bytes(target, slot + 16)
        return target + as_number(load_word(slot + 24) >> size_shift)
    text_size = length + 7 & ~7 if length > SHORT else 0
    size = as_number(load_word(slot + 24))
    copy_text(target, arena + as_number(load_word(slot + 16)) + text_size, size)
    return target + size


@inner_kernel
def lacking(words: Words) -> int:
    """What there must be more of before another pre-token can be remembered; `DONE` if there is enough."""
    if 2 * words.used[SLOTS_USED] >= words.slots.shape[0]:
        return NEEDS_SLOTS
    if words.used[ARENA_USED] + 5 * LONGEST_REMEMBERED + 16 > words.arena.shape[0]:
        return NEEDS_ARENA
    return DONE


@inner_kernel
def remember(
    words: Words,
    number: int,
    low: np.uint64,
    high: np.uint64,
    place: int,
    length: int,
    ids: int,
    size: int,
    id_bytes: int,
) -> None:
    """Fill the free slot `number` with the pre-token at `place`, whose ids are the `size` bytes at `ids`."""
    slots, used = words.slots, words.used
    if length <= SHORT and size <= 16 - id_bytes:
        used[SLOTS_USED] += 1
        slots[number, 0], slots[number, 1] = low, high
        slots[number, 2] = load_word(ids)
        tail = load_word(ids + 8) & ALL_BITS >> as_mask(8 * id_bytes)
        slots[number, 3] = tail | as_mask(size) << as_mask(64 - 8 * id_bytes)
    elif length <= LONGEST_REMEMBERED:
        used[SLOTS_USED] += 1
        arena = words.arena.ctypes.data
        record = used[ARENA_USED]
        slots[number, 0], slots[number, 1] = low, high | SPILLED
        slots[number, 2], slots[number, 3] = as_mask(record), as_mask(size)
        if length > SHORT:
            copy_text(arena + record, place, length)
            record += length + 7 & ~7
        copy_text(arena + record, ids, size)
        used[ARENA_USED] = record + (size + 7 & ~7)


@inner_kernel
def copy_text(target: int, source: int, size: int) -> None:
    """Copy `size` bytes, and up to 7 more."""
    for offset in range(0, size, 8):
        store_word(target + offset, load_word(source + offset))


@kernel
def encode(
    text: int,
    segments: Array,
    pattern: int,
    classes: Array,
    merges: Merges,
    words: Words,
    output: int,
    capacity: int,
    id_bytes: int,
    progress: Array,
    ends: Array,
) -> int:
    """Write the ids of each segment of the text at the address `text` to the address `output`, one after the other.

    A segment is a pair of offsets, encoded as if it were all there is; what follows continues none of its characters.
    There is room for `capacity` ids of `id_bytes` (2 or 4) each. `progress` holds the segment to go on with, the place
    in it, and how many ids are written; `ends[i]` becomes the number of ids up to the end of segment i.
    """
    starts = np.empty(MAX_STARTS + 16, np.int64)
    keys = np.empty((MAX_STARTS, 3), np.uint64)
    tokens = np.empty(MERGE_BY_SEARCH, np.int64)
    ranks = np.empty(MERGE_BY_SEARCH, np.int64)
    size_shift = as_mask(64 - 8 * id_bytes)
    slots, arena = words.slots, words.arena.ctypes.data
    target = output + id_bytes * progress[2]
    limit = output + id_bytes * capacity - OUTPUT_MARGIN
    status = DONE

    number, place = progress[0], progress[1]
    while number < segments.shape[0] and status == DONE:
        end = segments[number, 1]
        while place < end and status == DONE:
            count = scan(pattern, text, place, end, classes, starts)
            if target + id_bytes * (starts[count - 1] - place) > limit:
                status = NEEDS_OUTPUT
                break
            prepare_batch(text, starts, count, slots, keys)
            index, target = emit_known(keys, 0, count - 1, target, size_shift)
            while index < count - 1:
                begin = text + starts[index]
                length = text + starts[index + 1] - begin
                low, high = keys[index, 0], keys[index, 1]
                if length > SHORT:
                    low, high = long_key(begin, length)
                slot = find_slot(slots, arena, low, high, begin, length)
                if slots[slot, 1] != FREE:
                    target = emit_from(slots.ctypes.data + SLOT_BYTES * slot, arena, length, target, size_shift)
                else:
                    status = lacking(words)
                    if status != DONE:
                        break
                    size = id_bytes * merge(begin, length, merges, tokens, ranks, target, id_bytes)
                    remember(words, slot, low, high, begin, length, target, size, id_bytes)
                    target += size
                index, target = emit_known(keys, index + 1, count - 1, target, size_shift)
            place = starts[index]
        if status == DONE:
            ends[number] = (target - output) // id_bytes
            number += 1
            if number < segments.shape[0]:
                place = segments[number, 0]
    progress[0], progress[1], progress[2] = number, place, (target - output) // id_bytes
    return status
