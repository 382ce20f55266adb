"""Ids to bytes: look up where an id's bytes are, and copy them."""

from __future__ import annotations

from transformerlm.tokenizer.kernels.machine import Array, kernel, load_word, store_word


@kernel
def decoded_size(ids: Array, ends: Array) -> int:
    """How many bytes `ids` stand for; -1 if one of them stands for none or is out of range."""
    size = 0
    for index in range(ids.shape[0]):
        token = ids[index]
        if token < 0 or token >= ends.shape[0] - 1 or ends[token + 1] == ends[token]:
            return -1
        size += ends[token + 1] - ends[token]
    return size


@kernel
def decode(ids: Array, ends: Array, texts: int, target: int) -> None:
    """Write the bytes of each id, and up to 7 more, to the address `target`; those of all tokens lie at `texts`."""
    for index in range(ids.shape[0]):
        token = ids[index]
        for offset in range(ends[token], ends[token + 1], 8):
            store_word(target + offset - ends[token], load_word(texts + offset))
        target += ends[token + 1] - ends[token]
