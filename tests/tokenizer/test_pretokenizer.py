from __future__ import annotations

import unicodedata

import regex
import tiktoken
from hypothesis import given

from tests.tokenizer.oracles import GPT2_PATTERN, any_bytes, any_text, fuzz
from transformerlm.tokenizer import pretokenizer
from transformerlm.tokenizer.pretokenizer import as_text, pretokenize, to_bytes
from transformerlm.tokenizer.unicode_classes import LETTERS, NUMBERS, UNICODE_VERSION, WHITE_SPACE, parse_ranges

CHARACTERS = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
TABLES = {r"\p{L}": LETTERS, r"\p{N}": NUMBERS, r"\s": WHITE_SPACE}


def members(table: str) -> str:
    return "".join(chr(code) for first, last in parse_ranges(table) for code in range(first, last + 1))


def words_of(text: str) -> list[str]:
    return [word for words in pretokenize(text) for word in words]


def test_every_code_point_has_the_class_that_tiktoken_gives_it() -> None:
    for pattern, table in TABLES.items():
        # Text that the pattern does not match gets no tokens, so decoding returns the class.
        probe = tiktoken.Encoding(
            name="probe", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
        )
        assert probe.decode(probe.encode_ordinary(CHARACTERS)) == members(table)


def test_the_tables_agree_with_the_standard_library_where_it_knows_the_character() -> None:
    for general_category, table in (("L", LETTERS), ("N", NUMBERS)):
        inside = set(members(table))
        for character in CHARACTERS:
            category = unicodedata.category(character)
            if category != "Cn":  # assigned already in the Unicode version of this Python
                assert (category[0] == general_category) == (character in inside), hex(ord(character))


def test_the_tables_are_of_the_version_they_name() -> None:
    assert UNICODE_VERSION == "16.0"
    assert "\u1c89" in members(LETTERS)  # Cyrillic capital Tje, new in 16.0
    assert "\U00011db0" not in members(LETTERS)  # Tolong Siki, new in 17.0


# Letters and numbers of later Unicode versions, which `regex` knows.
NEWER = set(regex.findall(r"[\p{L}\p{N}]", CHARACTERS)) - set(members(LETTERS)) - set(members(NUMBERS))


@fuzz
@given(any_text)
def test_splits_as_the_regex_module_does(text: str) -> None:
    text = "".join(character for character in text if character not in NEWER)
    assert words_of(text) == regex.findall(GPT2_PATTERN, text)


@fuzz
@given(any_bytes)
def test_pre_tokens_of_any_bytes_join_to_them(data: bytes) -> None:
    words = words_of(as_text(data))
    assert b"".join(map(to_bytes, words)) == data
    assert all(words)


@fuzz
@given(any_text, any_text, any_text)
def test_only_what_stands_between_start_and_end_counts(before: str, text: str, after: str) -> None:
    part = [w for words in pretokenize(before + text + after, len(before), len(before) + len(text)) for w in words]
    assert part == words_of(text)


@fuzz
@given(any_text)
def test_chunks_do_not_change_the_split(text: str) -> None:
    whole, chunk = words_of(text), pretokenizer.CHUNK
    try:
        for pretokenizer.CHUNK in (1, 2, 5):
            assert words_of(text) == whole
    finally:
        pretokenizer.CHUNK = chunk


def test_chunks_bound_what_is_held_at_a_time() -> None:
    lists = list(pretokenize("some words " * 50_000))
    assert len(lists) > 5
    assert max(map(len, lists)) <= pretokenizer.CHUNK


def test_long_runs_of_one_class_are_one_pre_token() -> None:
    for run in ("a" * 100_000, "7" * 100_000, "-" * 100_000, "一" * 100_000):
        assert words_of(run) == [run]
    assert words_of(" " * 100_000 + "a") == [" " * 99_999, " a"]


def test_surrogates_in_a_string() -> None:
    assert to_bytes(as_text(b"\xff\xc3".decode("utf-8", "surrogateescape"))) == b"\xff\xc3"
    # Escaped bytes that together are a character are that character.
    assert as_text("\udcc3\udca9") == "é"
    assert as_text("\ud83d\ude00") == "😀"
    assert as_text("a\ud800b") == "a\ufffdb"
