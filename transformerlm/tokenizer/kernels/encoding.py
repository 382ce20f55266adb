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

**Merging** happens once for each new pre-token: find the pair of neighbours with the lowest rank, replace it by the
token that it makes, and again. Ranks of pairs are looked up in a hash table, `pairs`, and for two bytes in an array.

Kernels cannot make an array larger for their caller. They stop between two pre-tokens and return what they lack; the
caller sees to it (`compiled_encoder.py`), and the kernel goes on where it stopped.
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer.kernels.machine import (
    ZERO,
    Array,
    as_mask,
    as_number,
    copy_16_bytes,
    count_bits,
    inner_kernel,
    kernel,
    load_byte,
    load_word,
    low_bits,
    prefetch,
    store_16,
    store_32,
    store_word,
)
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

# Odd numbers of no pattern. The product's high bits depend on all bits of a key.
MIX_1 = np.uint64(0x9E3779B97F4A7C15)
MIX_2 = np.uint64(0xD6E8FEB86659FD93)
HALF = np.uint64(32)
BYTE = np.uint64(8)
ALL_BITS = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

NO_MERGE = 1 << 30
RANK_BITS = np.uint64(21)
RANK_MASK = np.uint64((1 << 21) - 1)
MAX_TOKENS = 1 << 21
"""Two tokens and a rank fit into 63 bits."""

MERGE_BY_SEARCH = 64
"""Up to so many bytes the best pair is searched anew after each merge; beyond, a heap keeps the work at O(n log n)."""
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


# -- merging -----------------------------------------------------------------------------------------------------------


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
def merge_by_search(
    place: int,
    length: int,
    byte_pairs: Array,
    pairs: Array,
    made: Array,
    tokens: Array,
    ranks: Array,
) -> int:
    """Merge the bytes at `place` into `tokens` and return how many are left. `ranks[i]`: of the tokens i and i + 1."""
    last = length - 1
    best, best_rank = 0, NO_MERGE
    tokens[0] = load_byte(place)
    for index in range(last):
        tokens[index + 1] = load_byte(place + index + 1)
        rank = byte_pairs[tokens[index] << 8 | tokens[index + 1]]
        ranks[index] = rank
        if rank < best_rank:
            best, best_rank = index, rank
    while best_rank < NO_MERGE:
        tokens[best] = made[best_rank]
        last -= 1
        for index in range(best + 1, last + 1):
            tokens[index] = tokens[index + 1]
            ranks[index - 1] = ranks[index]
        if best > 0:
            ranks[best - 1] = rank_of(pairs, tokens[best - 1], tokens[best])
        if best < last:
            ranks[best] = rank_of(pairs, tokens[best], tokens[best + 1])
        best_rank = NO_MERGE
        for index in range(last):
            if ranks[index] < best_rank:
                best, best_rank = index, ranks[index]
    return last + 1


@kernel
def merge_by_heap(place: int, length: int, pairs: Array, made: Array, tokens: Array) -> int:
    """The same for any length. Candidates wait in a heap as rank and position; neighbours are linked by position."""
    after = np.empty(length, np.int64)
    before = np.empty(length, np.int64)
    heap = np.empty(3 * length, np.int64)  # a merge removes a token and proposes two pairs
    size = 0
    for index in range(length):
        tokens[index] = load_byte(place + index)
        after[index] = index + 1
        before[index] = index - 1
    for index in range(length - 1):
        size = push(heap, size, rank_of(pairs, tokens[index], tokens[index + 1]), index)
    while size:
        rank, left = heap[0] >> 32, heap[0] & 0xFFFF_FFFF
        size = pop(heap, size)
        right = after[left]
        # Outdated when an earlier merge has taken one of the two.
        if tokens[left] < 0 or right == length or rank_of(pairs, tokens[left], tokens[right]) != rank:
            continue
        tokens[left], tokens[right] = made[rank], -1
        following = after[left] = after[right]
        if following < length:
            before[following] = left
            size = push(heap, size, rank_of(pairs, tokens[left], tokens[following]), left)
        if before[left] >= 0:
            size = push(heap, size, rank_of(pairs, tokens[before[left]], tokens[left]), before[left])
    count = 0
    index = 0
    while index < length:
        tokens[count] = tokens[index]
        count += 1
        index = after[index]
    return count


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


# -- encoding ----------------------------------------------------------------------------------------------------------


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
def write_ids(tokens: Array, count: int, id_of_token: Array, target: int, id_bytes: int) -> None:
    if id_bytes == 2:
        for index in range(count):
            store_16(target + 2 * index, id_of_token[tokens[index]])
    else:
        for index in range(count):
            store_32(target + 4 * index, id_of_token[tokens[index]])


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
    byte_pairs: Array,
    pairs: Array,
    made: Array,
    id_of_token: Array,
    slots: Array,
    arena_array: Array,
    used: Array,
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
    lanes = 16 // id_bytes - 1
    size_shift = as_mask(64 - 8 * id_bytes)
    arena = arena_array.ctypes.data
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
                begin = starts[index]
                length = starts[index + 1] - begin
                low, high = keys[index, 0], keys[index, 1]
                if length > SHORT:
                    low, high = long_key(text + begin, length)
                slot = find_slot(slots, arena, low, high, text + begin, length)
                if slots[slot, 1] != FREE:
                    if slots[slot, 1] == high and length <= SHORT:
                        copy_16_bytes(target, slots.ctypes.data + SLOT_BYTES * slot + 16)
                        target += as_number(slots[slot, 3] >> size_shift)
                    else:
                        skip = length + 7 & ~7 if length > SHORT else 0
                        size = as_number(slots[slot, 3])
                        copy_text(target, arena + as_number(slots[slot, 2]) + skip, size)
                        target += size
                else:
                    if 2 * used[SLOTS_USED] >= slots.shape[0]:
                        status = NEEDS_SLOTS
                    elif used[ARENA_USED] + 5 * LONGEST_REMEMBERED + 16 > arena_array.shape[0]:
                        status = NEEDS_ARENA
                    if status != DONE:
                        break
                    if length <= MERGE_BY_SEARCH:
                        found = tokens
                        left = merge_by_search(text + begin, length, byte_pairs, pairs, made, tokens, ranks)
                    else:
                        found = np.empty(length, np.int64)
                        left = merge_by_heap(text + begin, length, pairs, made, found)
                    write_ids(found, left, id_of_token, target, id_bytes)
                    size = left * id_bytes
                    if length <= SHORT and left <= lanes:
                        used[SLOTS_USED] += 1
                        slots[slot, 0], slots[slot, 1] = low, high
                        store_word(slots.ctypes.data + SLOT_BYTES * slot + 16, load_word(target))
                        tail = load_word(target + 8) & ALL_BITS >> as_mask(8 * id_bytes)
                        slots[slot, 3] = tail | as_mask(size) << size_shift
                    elif length <= LONGEST_REMEMBERED:
                        used[SLOTS_USED] += 1
                        record = used[ARENA_USED]
                        slots[slot, 0], slots[slot, 1] = low, high | SPILLED
                        slots[slot, 2], slots[slot, 3] = as_mask(record), as_mask(size)
                        if length > SHORT:
                            copy_text(arena + record, text + begin, length)
                            record += length + 7 & ~7
                        copy_text(arena + record, target, size)
                        used[ARENA_USED] = record + (size + 7 & ~7)
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
