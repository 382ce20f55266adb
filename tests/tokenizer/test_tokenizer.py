from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.oracles import any_bytes, any_text, fuzz, tiktoken_of
from trainkit.errors import UserError
from transformerlm.tokenizer import streams
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.unicode_classes import LETTERS, NUMBERS, WHITE_SPACE, parse_ranges
from transformerlm.tokenizer.vocabulary import trained_vocabulary


@pytest.fixture(scope="module")
def gpt2_reference(gpt2: Tokenizer) -> tiktoken.Encoding:
    return tiktoken_of(gpt2)


@pytest.fixture(scope="module")
def small_reference(small: Tokenizer) -> tiktoken.Encoding:
    return tiktoken_of(small)


class TestIdsEqualTiktoken:
    def test_on_real_text(self, gpt2: Tokenizer, gpt2_reference: tiktoken.Encoding, stories: str) -> None:
        ids = gpt2.encode(stories)
        assert ids.dtype == np.uint16
        assert ids.tolist() == gpt2_reference.encode(stories, allowed_special="all")
        assert gpt2.decode(ids) == stories
        assert gpt2.count(stories) == len(ids)

    @fuzz
    @given(text=any_text)
    def test_on_any_unicode(self, gpt2: Tokenizer, gpt2_reference: tiktoken.Encoding, text: str) -> None:
        assert gpt2.encode(text).tolist() == gpt2_reference.encode(text, allowed_special="all")

    @fuzz
    @given(text=any_text)
    def test_of_a_tokenizer_trained_here(self, small: Tokenizer, small_reference: tiktoken.Encoding, text: str) -> None:
        assert small.encode(text).tolist() == small_reference.encode(text, allowed_special="all")

    def test_on_the_edges_of_every_class(self, gpt2: Tokenizer, gpt2_reference: tiktoken.Encoding) -> None:
        edges = {
            code
            for table in (LETTERS, NUMBERS, WHITE_SPACE)
            for first, last in parse_ranges(table)
            for code in (first - 1, first, last, last + 1)
            if not 0xD800 <= code < 0xE000
        }
        text = "".join(f"a{chr(code)}1 {chr(code)}{chr(code)}-" for code in sorted(edges))
        assert gpt2.encode(text).tolist() == gpt2_reference.encode_ordinary(text)

    def test_on_long_runs(self, gpt2: Tokenizer, gpt2_reference: tiktoken.Encoding) -> None:
        for run in (" " * 20_000, "\n" * 20_000 + "x", "ab" * 10_000, "-=" * 10_000, "é" * 10_000):
            assert gpt2.encode(run).tolist() == gpt2_reference.encode_ordinary(run)


class TestSpecialTokens:
    NAMES = ("<|endoftext|>", "<|pad|>", "<|mask|>")

    @pytest.mark.parametrize("first", [*NAMES, "  a", "b <|", ""])
    def test_every_arrangement(self, small: Tokenizer, small_reference: tiktoken.Encoding, first: str) -> None:
        for others in itertools.product([*self.NAMES, "  a", "b <|", ""], repeat=3):
            self.check("".join([first, *others]), small, small_reference)

    def check(self, text: str, small: Tokenizer, small_reference: tiktoken.Encoding) -> None:
        for allowed in (set(), {"<|pad|>"}, {"<|pad|>", "<|mask|>"}, set(self.NAMES)):
            expected = small_reference.encode(text, allowed_special=allowed, disallowed_special=())
            assert small.encode(text, allowed_special=allowed).tolist() == expected
        assert small.encode(text).tolist() == small.encode(text, allowed_special=self.NAMES).tolist()
        assert small.encode(text, allowed_special="none").tolist() == small_reference.encode_ordinary(text)
        assert small.decode(small.encode(text)) == text

    def test_the_longest_of_two_that_start_together_wins(self, small: Tokenizer) -> None:
        tokenizer = small.with_special_tokens(["<|a", "<|a|>", "<|a|>b"])
        ids = tokenizer.special_tokens
        assert tokenizer.encode("<|a|>b<|a|>c<|a").tolist() == [
            ids["<|a|>b"], ids["<|a|>"], *tokenizer.encode("c"), ids["<|a"],
        ]  # fmt: skip

    def test_in_bytes(self, small: Tokenizer) -> None:
        assert small.encode(b"\xff<|pad|>\xff").tolist() == [255, small.pad_id, 255]

    def test_names(self, small: Tokenizer) -> None:
        assert (small.eot_id, small.pad_id, small.mask_id) == (327, 328, 329)

    def test_appended_ones_follow_the_last_id_and_change_nothing(self, gpt2: Tokenizer) -> None:
        extended = gpt2.with_special_tokens(["<|endoftext|>", "<|pad|>", "<|mask|>"])
        assert (extended.eot_id, extended.pad_id, extended.mask_id) == (50256, 50257, 50258)
        assert extended.vocab_size == 50259
        assert gpt2.special_tokens == {"<|endoftext|>": 50256}
        assert extended.encode("one <|pad|>").tolist() == [*gpt2.encode("one "), 50257]
        assert extended.content_hash != gpt2.content_hash
        assert extended.with_special_tokens(["<|pad|>"]).content_hash == extended.content_hash

    def test_bad_use(self, small: Tokenizer) -> None:
        bare = Tokenizer(trained_vocabulary([], []))
        assert bare.encode("<|pad|>").tolist() == list(b"<|pad|>")
        with pytest.raises(UserError, match=r"no <\|mask\|> token"):
            _ = bare.mask_id
        with pytest.raises(UserError, match="'<x>' is not a special token"):
            small.encode("a", allowed_special={"<x>"})
        with pytest.raises(UserError, match="'some'"):
            small.encode("a", allowed_special="some")
        for names, message in (("", "is empty"), ("x", "single byte")):
            with pytest.raises(UserError, match=message):
                small.with_special_tokens([names])


class TestBytes:
    @fuzz
    @given(data=any_bytes)
    def test_any_bytes_come_back(self, small: Tokenizer, data: bytes) -> None:
        ids = small.encode(data)
        assert small.decode_bytes(ids) == data
        assert small.decode(ids) == data.decode("utf-8", "replace")
        assert ids.tolist() == small.encode(data.decode("utf-8", "surrogateescape")).tolist()

    @fuzz
    @given(text=any_text)
    def test_text_and_its_utf8_have_the_same_ids(self, small: Tokenizer, text: str) -> None:
        assert small.encode(text.encode()).tolist() == small.encode(text).tolist()

    @fuzz
    @given(data=any_bytes)
    def test_byte_lengths_sum_to_the_length(self, small: Tokenizer, data: bytes) -> None:
        lengths = small.byte_lengths()
        assert lengths.shape == (small.vocab_size,)
        assert lengths[small.encode(data, allowed_special="none")].sum() == len(data)

    def test_byte_lengths_of_special_tokens_are_zero(self, small: Tokenizer, gpt2: Tokenizer, stories: str) -> None:
        assert small.byte_lengths()[-3:].tolist() == [0, 0, 0]
        assert (small.byte_lengths()[:-3] > 0).all()
        marks = stories.count("<|endoftext|>") * len("<|endoftext|>")
        assert gpt2.byte_lengths()[gpt2.encode(stories)].sum() == len(stories.encode()) - marks


class TestDecode:
    @fuzz
    @given(ids=st.lists(st.integers(0, 329)))
    def test_stream_joins_to_decode_and_never_splits_a_character(self, small: Tokenizer, ids: list[int]) -> None:
        pieces = list(small.decode_stream(ids))
        assert "".join(pieces) == small.decode(ids)
        assert all(pieces)

    @fuzz
    @given(text=any_text)
    def test_stream_of_valid_text_holds_no_replacement(self, small: Tokenizer, text: str) -> None:
        pieces = list(small.decode_stream(small.encode(text)))
        assert "".join(pieces) == text
        for piece in pieces:
            piece.encode()  # no lone halves

    def test_text_comes_as_soon_as_it_is_certain(self, small: Tokenizer) -> None:
        decoder = small.incremental_decoder()
        assert [decoder.push(value) for value in "é!".encode()] == ["", "é", "!"]
        assert decoder.push(0xC3) == ""
        assert decoder.finish() == "\ufffd"

    def test_errors_are_treated_as_asked(self, small: Tokenizer) -> None:
        assert small.decode([0xFF], errors="ignore") == ""
        assert small.decode([0xFF], errors="surrogateescape").encode("utf-8", "surrogateescape") == b"\xff"
        with pytest.raises(UnicodeDecodeError):
            small.decode([0xFF], errors="strict")

    def test_kinds_of_ids(self, small: Tokenizer) -> None:
        ids = small.encode("Once upon a time")
        for same in (ids, ids.tolist(), tuple(ids), ids.astype(np.int64)):
            assert small.decode(same) == "Once upon a time"
        assert small.decode([]) == small.decode(np.array([], dtype=np.uint16)) == ""

    @pytest.mark.parametrize("bad", [330, -1, 10**6, 2**40])
    def test_id_outside_the_vocabulary(self, small: Tokenizer, bad: int) -> None:
        with pytest.raises(UserError, match=rf"{bad} is not in the vocabulary, whose ids are below 330"):
            small.decode([1, bad])

    def test_what_is_not_a_row_of_ids(self, small: Tokenizer) -> None:
        for bad in ([0.5], [[1, 2]], ["a"], [True], 3):
            with pytest.raises(UserError, match="one row of integers"):
                small.decode(bad)


class TestBatches:
    def test_batch_equals_one_by_one(self, small: Tokenizer) -> None:
        texts = ["one", "", b"\xff", "two <|pad|>"]
        for ids, text in zip(small.encode_batch(texts), texts, strict=True):
            assert ids.tolist() == small.encode(text).tolist()
            assert ids.dtype == small.dtype

    def test_iterable_is_read_as_needed(self, small: Tokenizer) -> None:
        read: list[int] = []

        def texts() -> Iterator[str]:
            for number in itertools.count():
                read.append(number)
                yield "text"

        stream = small.encode_iterable(texts())
        assert read == []
        for _ in range(3):
            assert next(stream).tolist() == small.encode("text").tolist()
        assert len(read) <= streams.MOST_TEXTS

    def test_a_full_cache_gives_the_same_ids(self, small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "".join(f" {number} word{number % 7}" for number in range(500))
        expected = Tokenizer(small.vocabulary).encode(text).tolist()
        tokenizer = Tokenizer(small.vocabulary)
        monkeypatch.setattr(type(tokenizer._plain._words), "LARGEST_SIZE", 10)
        assert tokenizer.encode(text).tolist() == expected
        assert len(tokenizer._plain._words) <= 10
        tokenizer.encode("x" * 1000)
        assert "x" * 1000 not in tokenizer._plain._words

    def test_ids_of_short_texts_can_be_written_to(self, small: Tokenizer) -> None:
        for text in ("Once upon", "Once  upon", ""):
            ids = small.encode(text)
            ids[:] = 0
            assert small.encode(text).tolist() == Tokenizer(small.vocabulary).encode(text).tolist()

    def test_large_vocabularies_need_32_bits(self, small: Tokenizer) -> None:
        names = [f"<|{number}|>" for number in range(65536 - 330 + 1)]
        assert small.with_special_tokens(names[:-1]).encode("a", allowed_special="none").dtype == np.uint16
        large = small.with_special_tokens(names)
        assert large.encode("a", allowed_special="none").dtype == np.uint32
        assert large.encode(names[-1], allowed_special={names[-1]}).tolist() == [65536]

    def test_pickles_for_worker_processes(self, small: Tokenizer) -> None:
        copy = pickle.loads(pickle.dumps(small))
        assert copy.content_hash == small.content_hash
        assert copy.encode("Once upon").tolist() == small.encode("Once upon").tolist()
