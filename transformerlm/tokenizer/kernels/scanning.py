"""Where pre-tokens start.

`scan_gpt2` looks at 64 bytes a step. A *mask* is a word with one bit for each of these bytes, the first byte lowest:
the letters, the white space, and so on. Shifting a mask by one lays each byte beside its neighbour, so a handful of
logical operations answers for all 64 at once what the pattern asks for each: "a letter, and no letter before it". ASCII
is classified by vector comparisons, and the other characters one by one, from the pinned Unicode tables.

GPT-2's pattern in these terms. Each byte is a letter, a number, white space or something else; characters of several
bytes count as that many of a kind. A pre-token starts

- where a run of letters, of numbers or of something else starts, unless a space stands before it: the space starts it;
- where white space starts;
- at the last character of white space that something follows: `\\s+(?!\\S)` leaves it to what follows, and a space
  joins that, other white space stays alone;
- and an apostrophe at a start takes one or two letters with it ('s, 't, 're, …), after which the next one starts.

A step decides for its bytes but those at the end whose successor it does not see, and whatever it cannot finish is
looked at again by the next step. The pattern looks ahead but never back, so scanning may begin anew at any start and
finds the same starts: there is no state between two calls.
"""

from __future__ import annotations

import numpy as np

from transformerlm.tokenizer.kernels.machine import (
    ONE,
    ZERO,
    Array,
    as_number,
    bit,
    classify_64_bytes,
    count_bits,
    highest_bit,
    inner_kernel,
    load_byte,
    load_word,
    low_bits,
    lowest_bit,
)

# What a character is: the flags in the table of classes, one byte per code point.
LETTER = 1
NUMBER = 2
WHITE = 4
UPPER = 8
LOWER = 16
MARK = 32

BATCH = 2048
"""Bytes to scan at a time: the starts, and what is computed from them, stay in the nearest cache."""
MAX_STARTS = BATCH + 2 * 64
"""How many starts a batch can have: a step that begins below `BATCH`, one more for a second start, and the end."""

TWO = np.uint64(2)
THREE = np.uint64(3)


@inner_kernel
def scan_gpt2(text: int, start: int, end: int, classes: Array, starts: Array) -> int:
    """Write the starts of the pre-tokens from `start` on, and return how many; the last one ends the one before it.

    `text` is an address, `start` (where a pre-token starts) and `end` are offsets in it. Stops after about `BATCH`
    bytes, but not before one pre-token is complete: there are at least two starts, or at `end` it is the second.
    """
    count = 0
    base = start
    # Of the byte before `base`, in bit 0. Nothing counts before the start.
    after_letter = after_number = after_other = after_space = after_white = ZERO
    while base < end and (base - start < BATCH or count < 2):
        letters, numbers, spaces, white, apostrophes, leads = classify_64_bytes(text + base)
        white_1, white_2, white_3, inner = white, ZERO, ZERO, ZERO  # white characters by length, at their first byte
        while leads != ZERO:
            place = lowest_bit(leads)
            leads &= leads - ONE
            kind, size = character(text + base + place, classes)
            bits = low_bits(size) << np.uint64(place)
            inner |= bits & (bits - ONE)
            if kind & LETTER:
                letters |= bits
            elif kind & NUMBER:
                numbers |= bits
            elif kind & WHITE:
                white |= bits
                if size == 2:
                    white_2 |= bit(place)
                else:
                    white_3 |= bit(place)
        if end - base < 64:  # to what stands before it, the end is like white space
            inside = low_bits(end - base)
            letters &= inside
            numbers &= inside
            spaces &= inside
            white |= ~inside
        others = ~(letters | numbers | white)

        runs = letters & ~(letters << ONE | after_letter)
        runs |= numbers & ~(numbers << ONE | after_number)
        runs |= others & ~(others << ONE | after_other)
        found = runs & ~(spaces << ONE | after_space)
        found |= (white_1 | white_2 | white_3) & ~(white << ONE | after_white)
        found |= white_1 & ~(white >> ONE) | white_2 & ~(white >> TWO) | white_3 & ~(white >> THREE)

        # Bit 63 has no successor here. The step ends before it, or before the character that it lies in.
        step = min(highest_bit(~inner), end - base)
        found &= low_bits(step)
        quotes = apostrophes & found
        while quotes != ZERO:
            place = lowest_bit(quotes)
            quotes &= quotes - ONE
            size = contraction(text, base + place, end)
            if size and place + size >= step < end - base:
                step = place  # reaches into the next step: leave all of it to that one
                found &= low_bits(step)
                break
            if size:
                found &= ~bit(place + 1)
                if place + size < step:
                    found |= bit(place + size)

        count = write_places(found, base, starts, count)
        last = np.uint64(step - 1)
        after_letter = letters >> last & ONE
        after_number = numbers >> last & ONE
        after_other = others >> last & ONE
        after_space = spaces >> last & ONE
        after_white = white >> last & ONE
        base += step
    if base >= end:
        starts[count] = end
        count += 1
    return count


@inner_kernel
def write_places(found: np.uint64, base: int, starts: Array, count: int) -> int:
    """Append `base` + the number of each set bit to `starts`."""
    total = count_bits(found)
    # Writing eight whether they are there or not costs less than asking each time.
    for index in range(8):
        starts[count + index] = base + lowest_bit(found)
        found &= found - ONE
    if total > 8:
        for index in range(8, 16):
            starts[count + index] = base + lowest_bit(found)
            found &= found - ONE
    for index in range(16, total):
        starts[count + index] = base + lowest_bit(found)
        found &= found - ONE
    return count + total


@inner_kernel
def contraction(text: int, place: int, end: int) -> int:
    """The length of 's, 'd, 'm, 't, 'll, 've or 're at `place`, where an apostrophe stands; 0 if it is none."""
    first = load_byte(text + place + 1)
    if place + 1 < end and (first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t")):
        return 2
    if place + 2 < end:
        second = load_byte(text + place + 2)
        if first == ord("l") and second == ord("l"):
            return 3
        if second == ord("e") and (first == ord("v") or first == ord("r")):
            return 3
    return 0


@inner_kernel
def character(place: int, classes: Array) -> tuple[int, int]:
    """What the character at the address `place` is, and how many bytes it has.

    A byte that is no valid UTF-8 is a character of its own and of no class.
    """
    word = as_number(load_word(place))  # the first byte is the lowest
    if word & 0x80 == 0:
        return classes[word & 0x7F], 1
    if word & 0xC0E0 == 0x80C0:
        code = (word & 0x1F) << 6 | word >> 8 & 0x3F
        if code >= 0x80:
            return classes[code], 2
    elif word & 0xC0C0F0 == 0x8080E0:
        code = (word & 0x0F) << 12 | (word >> 8 & 0x3F) << 6 | word >> 16 & 0x3F
        if code >= 0x800 and not 0xD800 <= code < 0xE000:
            return classes[code], 3
    elif word & 0xC0C0C0F8 == 0x808080F0:
        code = (word & 0x07) << 18 | (word >> 8 & 0x3F) << 12 | (word >> 16 & 0x3F) << 6 | word >> 24 & 0x3F
        if 0x10000 <= code < 0x110000:
            return classes[code], 4
    return 0, 1
