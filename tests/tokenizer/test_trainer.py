from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.conftest import STORY
from tests.tokenizer.oracles import any_text, fuzz, naive_merges
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.trainer import count_words, learn_merges, train_tokenizer


@pytest.mark.parametrize(
    "text",
    [
        STORY,
        "a" * 37 + " " + "a" * 5,  # pairs that overlap themselves
        "abab baba abba " * 9,  # equal counts: the tie-break decides nearly every merge
        "日本語のテキスト、日本の本。 Ελληνικά and русский",
        "".join(random.Random(1).choices("xyz \n", k=3000)),
        "z" + "".join(map(chr, range(300))) * 2,  # every byte from 0x00 on
    ],
    ids=["story", "run", "ties", "scripts", "random", "bytes"],
)
def test_merges_equal_the_naive_trainer(text: str) -> None:
    words = count_words([text])
    assert learn_merges(words, 150) == naive_merges(words, 150)


def test_merges_equal_the_naive_trainer_on_real_text(stories: str) -> None:
    words = count_words([stories[:40_000]])
    assert learn_merges(words, 250) == naive_merges(words, 250)


@fuzz
@given(st.dictionaries(st.text(alphabet="ab", max_size=12).map(str.encode), st.integers(1, 5), max_size=8))
def test_merges_equal_the_naive_trainer_on_any_words(words: dict[bytes, int]) -> None:
    assert learn_merges(words, 40) == naive_merges(words, 40)


def test_of_equal_counts_the_greatest_pair_of_byte_strings_wins() -> None:
    # (b"b", b"c") > (b"b", b"a") and (b"bc", b"x") > (b"b", b"z"): compared as pairs, a prefix being smaller.
    assert learn_merges({b"ba": 1, b"bc": 1}, 1) == [(b"b", b"c")]
    assert learn_merges({b"bc": 3, b"bcx": 2, b"bz": 2}, 2)[1] == (b"bc", b"x")


def test_order_of_the_texts_and_of_the_words_does_not_matter() -> None:
    texts = STORY.splitlines(keepends=True)
    spec = TokenizerTrainingSpec(vocab_size=320)
    assert train_tokenizer(texts, spec).content_hash == train_tokenizer(reversed(texts), spec).content_hash


def test_texts_are_read_once_and_let_go() -> None:
    alive = 0

    class Text(str):
        def __init__(self, *_: object) -> None:
            nonlocal alive
            alive += 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def texts() -> Iterator[str]:
        for _ in range(100):
            assert alive <= 2
            yield Text("a few words ")

    assert count_words(texts())[b" few"] == 100


@fuzz
@given(any_text)
def test_counted_words_make_up_the_text(text: str) -> None:
    counted = sum(len(word) * count for word, count in count_words([text]).items())
    assert counted == len(text.encode())


def test_special_tokens_are_never_learned() -> None:
    spec = TokenizerTrainingSpec(vocab_size=300, special_tokens=("stop", "<|endoftext|>"), allow_smaller=True)
    tokenizer = train_tokenizer(["unstoppable stop <|endoftext|> " * 50, "<|endoftext|>"], spec)
    assert b"stop" not in tokenizer.vocabulary.tokens
    assert not any(b"endoftext" in token for token in tokenizer.vocabulary.tokens)
    assert tokenizer.decode(tokenizer.encode("unstoppable")) == "unstoppable"
    assert tokenizer.special_tokens["stop"] in tokenizer.encode("unstoppable")


def test_text_that_is_not_utf8_is_counted_as_it_is() -> None:
    assert count_words([b"\xff\xfe\xff\xfe ok"]) == {b"\xff\xfe\xff\xfe": 1, b" ok": 1}


def test_ids_are_bytes_then_merges_then_special_tokens(small) -> None:
    assert small.vocab_size == 330
    assert [small.decode_bytes([token_id]) for token_id in range(256)] == [bytes([value]) for value in range(256)]
    for rank, (left, right) in enumerate(small.vocabulary.merges):
        assert small.decode_bytes([256 + rank]) == left + right
    assert small.special_tokens == {"<|endoftext|>": 327, "<|pad|>": 328, "<|mask|>": 329}


def test_progress_is_told() -> None:
    told: list[tuple[str, int]] = []
    train_tokenizer(["aa", "aa"], TokenizerTrainingSpec(vocab_size=260), progress=lambda *now: told.append(now))
    assert told == [("count", 2), ("merge", 1)]


class TestBadInput:
    def test_empty_corpus(self) -> None:
        for texts in ([], [""], ["<|endoftext|>"]):
            with pytest.raises(UserError, match="empty"):
                train_tokenizer(texts, TokenizerTrainingSpec(vocab_size=300))

    def test_vocabulary_too_small(self) -> None:
        with pytest.raises(UserError, match=r"tokenizer.vocab_size = 258 is too small.* at least 259") as caught:
            train_tokenizer(["text"], TokenizerTrainingSpec(vocab_size=258))
        assert caught.value.exit_code == EXIT_USAGE

    def test_the_smallest_vocabulary(self) -> None:
        for names in ((), ("<s>",), ("<s>", "</s>")):
            size = 256 + len(names)
            spec = TokenizerTrainingSpec(vocab_size=size, special_tokens=names)
            assert train_tokenizer(["text"], spec).vocab_size == size
            with pytest.raises(UserError, match=f"at least {size}"):
                train_tokenizer(["text"], TokenizerTrainingSpec(vocab_size=size - 1, special_tokens=names))

    def test_a_bad_setting_is_refused_before_the_text_is_read(self) -> None:
        def unread() -> Iterator[str]:
            raise AssertionError
            yield

        with pytest.raises(UserError, match="too small"):
            train_tokenizer(unread(), TokenizerTrainingSpec(vocab_size=258))

    def test_too_few_merges(self) -> None:
        spec = TokenizerTrainingSpec(vocab_size=300)
        with pytest.raises(UserError, match=r"only 3 of 41 merges; .* tokenizer.vocab_size = 262, or .*allow_smaller"):
            train_tokenizer(["abcd"], spec)
        smaller = train_tokenizer(["abcd"], TokenizerTrainingSpec(vocab_size=300, allow_smaller=True))
        assert smaller.vocab_size == 262 == smaller.mask_id + 1
        # The size that the message names is one that works.
        assert train_tokenizer(["abcd"], TokenizerTrainingSpec(vocab_size=262)).content_hash == smaller.content_hash

    @pytest.mark.parametrize(
        ("names", "message"),
        [(("",), "is empty"), (("<s>", "<s>"), "listed twice"), (("x",), "single byte"), (("\ud800x",), "Unicode")],
    )
    def test_special_tokens(self, names: tuple[str, ...], message: str) -> None:
        with pytest.raises(UserError, match=f"tokenizer.special_tokens: .*{message}") as caught:
            train_tokenizer(["text"], TokenizerTrainingSpec(vocab_size=300, special_tokens=names))
        assert caught.value.exit_code == EXIT_USAGE


def test_one_text_is_no_iterable_of_texts() -> None:
    for text in ("a string", b"bytes"):
        with pytest.raises(UserError, match="pass an iterable of texts"):
            train_tokenizer(text, TokenizerTrainingSpec())  # type: ignore[arg-type]
