"""The patterns of cl100k and o200k, a pre-token at a time.

Each `end_of_…` function is the pattern in plain code: given where a pre-token starts, it tries the alternatives in
their order and returns where the first one that matches ends. The patterns themselves are in `pretokenizer.py`. To add
one, write such a function and name it in `scan`.

This costs more per byte than the masks of `scan_gpt2`, but a small part of what the rest of the work costs.
"""

from __future__ import annotations

from transformerlm.tokenizer.kernels.machine import Array, inner_kernel, load_byte
from transformerlm.tokenizer.kernels.scanning import (
    BATCH,
    LETTER,
    LOWER,
    MARK,
    NUMBER,
    UPPER,
    WHITE,
    character,
    scan_gpt2,
)

GPT2 = 0
CL100K = 1
O200K = 2

SPACE = ord(" ")
CARRIAGE_RETURN = ord("\r")
LINE_FEED = ord("\n")
SLASH = ord("/")
APOSTROPHE = ord("'")


@inner_kernel
def scan(pattern: int, text: int, start: int, end: int, classes: Array, starts: Array) -> int:
    """As `scan_gpt2`, by any of the patterns."""
    if pattern == GPT2:
        return scan_gpt2(text, start, end, classes, starts)
    count = 0
    place = start
    while place < end and place - start < BATCH:
        starts[count] = place
        count += 1
        if pattern == CL100K:
            place = end_of_cl100k(text, place, end, classes)
        else:
            place = end_of_o200k(text, place, end, classes)
    starts[count] = place
    return count + 1


@inner_kernel
def end_of_cl100k(text: int, place: int, end: int, classes: Array) -> int:
    size = contraction_of_any_case(text, place, end)
    if size:
        return place + size
    kind, size = character(text + place, classes)
    if kind & LETTER:
        return end_of_run(text, place, end, classes, LETTER)
    if kind & NUMBER:
        return end_of_numbers(text, place, end, classes)
    if not is_line_end(text, place) and place + size < end:
        following = character(text + place + size, classes)[0]
        if following & LETTER:
            return end_of_run(text, place + size, end, classes, LETTER)
    symbols = end_of_symbols(text, place, end, classes)
    if symbols:
        while symbols < end and is_line_end(text, symbols):
            symbols += 1
        return symbols
    if end_of_run(text, place, end, classes, WHITE) == end:
        return end
    return end_of_white(text, place, end, classes)


@inner_kernel
def end_of_o200k(text: int, place: int, end: int, classes: Array) -> int:
    kind, size = character(text + place, classes)
    if kind & NUMBER:
        return end_of_numbers(text, place, end, classes)
    found = 0
    if kind & LETTER:
        found = end_of_lower_word(text, place, end, classes)
        if not found:
            found = end_of_run(text, place, end, classes, UPPER)
    elif not is_line_end(text, place):
        found = end_of_lower_word(text, place + size, end, classes)
        if not found and kind & MARK:  # a mark is what may stand before a word, and a word as well
            found = end_of_lower_word(text, place, end, classes)
        if not found:
            upper = end_of_run(text, place + size, end, classes, UPPER)
            found = upper if upper > place + size else 0
    if found:
        return found + contraction_of_any_case(text, found, end)
    symbols = end_of_symbols(text, place, end, classes)
    if symbols:
        while symbols < end and (is_line_end(text, symbols) or load_byte(text + symbols) == SLASH):
            symbols += 1
        return symbols
    return end_of_white(text, place, end, classes)


@inner_kernel
def end_of_lower_word(text: int, place: int, end: int, classes: Array) -> int:
    """Where `[capitals, others]*[small letters, others]+` ends; 0 if it does not match. Others: marks, other letters.

    The first part takes as much as it can. If no small letter follows, it gives back up to its last character that is
    one of the others.
    """
    last_other = 0
    while place < end:
        kind, size = character(text + place, classes)
        if kind & LOWER:
            return end_of_small(text, place, end, classes)
        if not is_other(kind) and not kind & UPPER:
            break
        place += size
        if is_other(kind):
            last_other = place
    return last_other


@inner_kernel
def end_of_small(text: int, place: int, end: int, classes: Array) -> int:
    while place < end:
        kind, size = character(text + place, classes)
        if not kind & LOWER and not is_other(kind):
            break
        place += size
    return place


@inner_kernel
def is_other(kind: int) -> bool:
    """Whether it is a mark, or a letter without case."""
    return kind & MARK != 0 or kind & (LETTER | LOWER | UPPER) == LETTER


@inner_kernel
def end_of_run(text: int, place: int, end: int, classes: Array, flag: int) -> int:
    while place < end:
        kind, size = character(text + place, classes)
        if not kind & flag:
            break
        place += size
    return place


@inner_kernel
def end_of_numbers(text: int, place: int, end: int, classes: Array) -> int:
    for _ in range(3):
        if place < end:
            kind, size = character(text + place, classes)
            if kind & NUMBER:
                place += size
    return place


@inner_kernel
def end_of_symbols(text: int, place: int, end: int, classes: Array) -> int:
    """Where ` ?[^\\\\s\\\\p{L}\\\\p{N}]+` ends; 0 if it does not match."""
    if load_byte(text + place) == SPACE:
        place += 1
    begin = place
    while place < end:
        kind, size = character(text + place, classes)
        if kind & (WHITE | LETTER | NUMBER):
            break
        place += size
    return place if place > begin else 0


@inner_kernel
def end_of_white(text: int, place: int, end: int, classes: Array) -> int:
    """Where `\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+` ends."""
    begin = last = place
    after_line = 0
    while place < end:
        kind, size = character(text + place, classes)
        if not kind & WHITE:
            break
        if is_line_end(text, place):
            after_line = place + 1
        last = place
        place += size
    if after_line:
        return after_line
    return place if place == end or last == begin else last


@inner_kernel
def is_line_end(text: int, place: int) -> bool:
    byte = load_byte(text + place)
    return byte in (LINE_FEED, CARRIAGE_RETURN)


@inner_kernel
def contraction_of_any_case(text: int, place: int, end: int) -> int:
    """The length of 's, 'd, 'm, 't, 'll, 've or 're at `place`, large or small; 0 if there is none."""
    if place + 1 >= end or load_byte(text + place) != APOSTROPHE:
        return 0
    first = load_byte(text + place + 1) | 0x20  # capitals become small
    if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
        return 2
    if place + 2 >= end:
        return 0
    second = load_byte(text + place + 2)
    if load_byte(text + place + 1) == 0xC5 and second == 0xBF:  # U+017F, an old form of s
        return 3
    second |= 0x20
    if first == ord("l") and second == ord("l"):
        return 3
    return 3 if second == ord("e") and (first == ord("v") or first == ord("r")) else 0
