"""Text in pieces of bounded size, cut where a cut changes no ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from trainkit.errors import UserError

PIECE = 1 << 22
"""Bytes or characters that are taken up at a time."""
MOST_TEXTS = 1 << 12

WHITE_BYTES = b" \t\n\x0b\x0c\r"


def batches(texts: Iterable[str | bytes], size: int = PIECE, most: int = MOST_TEXTS) -> Iterator[list[str | bytes]]:
    """The texts, as many at a time as reach `size` characters, or at `most` that many."""
    batch: list[str | bytes] = []
    so_far = 0
    for text in texts:
        batch.append(text)
        so_far += len(text)
        if so_far >= size or len(batch) == most:
            yield batch
            batch, so_far = [], 0
    if batch:
        yield batch


def file_pieces(path: Path | str, special_names: Collection[str]) -> Iterator[bytes]:
    """The content of a file in pieces; encoded one by one they give the ids of the whole."""
    names = [name.encode() for name in special_names if " " in name]
    try:
        with Path(path).open("rb") as file:
            yield from _pieces(file, names)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error


def _pieces(file: BinaryIO, special_names: list[bytes]) -> Iterator[bytes]:
    rest = b""
    while block := file.read(max(PIECE, len(rest))):  # at least as much again, so that no text is searched often
        rest += block
        cut = last_cut(rest, special_names)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def last_cut(text: bytes, special_names: Collection[bytes] = ()) -> int:
    """The last place where `text` may be cut, whatever follows it; 0 if there is none.

    That is before a space which follows a byte that is not white space: a space stands only at the start of a
    pre-token or among white space, and only white space looks ahead. A special token may hold a space, and is not cut.
    """
    space = text.rfind(b" ")
    while space > 0:
        before = text[space - 1]
        if before < 0x80 and before not in WHITE_BYTES and not _lies_in_special(text, space, special_names):
            return space
        space = text.rfind(b" ", 0, space)
    return 0


def _lies_in_special(text: bytes, cut: int, names: Collection[bytes]) -> bool:
    """Whether a special token reaches across `cut`, or might, where the text ends too early to tell."""
    for name in names:
        for begin in range(max(0, cut - len(name) + 1), cut):
            if name.startswith(text[begin : begin + len(name)]):
                return True
    return False
