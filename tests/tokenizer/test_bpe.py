from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.oracles import fuzz, naive_encode, naive_merges
from transformerlm.tokenizer.bpe import merge
from transformerlm.tokenizer.vocabulary import trained_vocabulary

small_words = st.text(alphabet="abc", max_size=30).map(str.encode)


def encode(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    tokens = trained_vocabulary(merges, ()).tokens
    table = {(tokens[left], tokens[right]): (rank, tokens[left + right]) for rank, (left, right) in enumerate(merges)}
    by_id = {token_id: token for token, token_id in tokens.items()}
    return [by_id[token_id] for token_id in merge(list(word), table)]


@fuzz
@given(st.lists(small_words, min_size=1, max_size=8), small_words)
def test_merging_by_rank_equals_applying_each_merge_in_turn(corpus: list[bytes], word: bytes) -> None:
    merges = naive_merges(dict.fromkeys(corpus, 1), 20)
    assert encode(word, merges) == naive_encode(word, merges)


def test_overlapping_pairs_merge_from_the_left() -> None:
    merges = [(b"a", b"a"), (b"aa", b"a")]
    assert encode(b"aaaaa", merges) == [b"aa", b"aaa"]


def test_a_megabyte_without_spaces_ends() -> None:
    # Quadratic merging would take hours here.
    word = bytes(random.Random(0).choices(b"ACGT", k=300_000))
    merges = naive_merges({word[:2000]: 1}, 60)
    tokens = encode(word, merges)
    assert b"".join(tokens) == word
    assert not set(pairwise(tokens)) & set(merges)


def test_empty_and_single() -> None:
    assert encode(b"", []) == []
    assert encode(b"a", [(b"a", b"a")]) == [b"a"]
