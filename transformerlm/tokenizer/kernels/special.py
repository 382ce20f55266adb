"""Find special tokens in a text: the leftmost first, and of those that start at the same place the longest."""

from __future__ import annotations

from transformerlm.tokenizer.kernels.machine import (
    ONE,
    ZERO,
    Array,
    equal_bytes,
    inner_kernel,
    kernel,
    load_byte,
    lowest_bit,
)


@kernel
def find_special(
    text: int,
    size: int,
    start: int,
    first_bytes: Array,
    names: Array,
    name_ends: Array,
    matches: Array,
) -> tuple[int, int]:
    """Write (start, end, number of the name) of the tokens found from `start` on, until `matches` is full.

    `names` holds the names one after the other, the longest first; `first_bytes` the bytes that they begin with.
    Returns how many were found and where to go on. Reads nothing beyond `size`.
    """
    count = 0
    place = start
    while place < size and count < matches.shape[0]:
        if place + 64 <= size:
            candidates = ZERO
            for index in range(first_bytes.shape[0]):
                candidates |= equal_bytes(text + place, first_bytes[index])
            following = place + 64
        else:  # the last bytes one by one
            candidates = ONE
            following = place + 1
        while candidates != ZERO:
            begin = place + lowest_bit(candidates)
            candidates &= candidates - ONE
            number = name_at(text, begin, size, names, name_ends)
            if number >= 0:
                length = name_ends[number + 1] - name_ends[number]
                matches[count, 0] = begin
                matches[count, 1] = begin + length
                matches[count, 2] = number
                count += 1
                following = begin + length
                break
        place = following
    return count, place


@inner_kernel
def name_at(text: int, begin: int, size: int, names: Array, name_ends: Array) -> int:
    """The number of the name at `begin`; -1 if there is none."""
    for number in range(name_ends.shape[0] - 1):
        length = name_ends[number + 1] - name_ends[number]
        index = 0
        while index < length and begin + length <= size:
            if load_byte(text + begin + index) != names[name_ends[number] + index]:
                break
            index += 1
        if index == length:
            return number
    return -1
