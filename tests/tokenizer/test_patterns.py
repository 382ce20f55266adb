"""The three patterns, plain and compiled, against tiktoken's own engine and the `regex` module."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tokenizer.conftest import STORY
from tests.tokenizer.oracles import GPT2_PATTERN, TRICKY, any_bytes, any_text, fuzz
from trainkit.errors import UserError
from transformerlm.tokenizer import readiness
from transformerlm.tokenizer import tokenizer as tokenizer_module
from transformerlm.tokenizer.pretokenizer import PATTERNS, as_text, pretokenize, to_bytes
from transformerlm.tokenizer.specs import PatternName, TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer
from transformerlm.tokenizer.vocabulary import trained_vocabulary

# As tiktoken 0.14 has them (tiktoken_ext/openai_public.py).
WORDS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REFERENCE: dict[PatternName, str] = {
    "gpt2": GPT2_PATTERN,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{WORDS[0]}*{WORDS[1]}+{WORDS[2]}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{WORDS[0]}+{WORDS[1]}*{WORDS[2]}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
names = st.sampled_from(sorted(REFERENCE))
PIECES = (*TRICKY, "'ſ", "'LL", "'Ve", "A", "Ab", "aB", "ǅ", "ʰ", "ª", "\u0301", "\u0903", "/", "\r", "\n\n", "1234")
NOT_UTF8 = (b"\xed\xa0\x80", b"\xc0\x80", b"\xe4\xb8", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xff")
texts = st.one_of(any_text, st.lists(st.sampled_from(PIECES), max_size=80).map("".join))

broken_texts = st.one_of(
    any_bytes,
    st.lists(st.one_of(st.sampled_from(NOT_UTF8), st.sampled_from(PIECES).map(str.encode)), max_size=80).map(b"".join),
)


@cache
def bare(pattern: PatternName) -> Tokenizer:
    """Merges any two equal bytes, so that cuts between equal bytes show in the ids."""
    merges = [(bytes([value]), bytes([value])) for value in range(256)]
    merges += [(b" ", b"'"), (b"'", b"s"), (b"\n", b" "), (b" ", b"\n"), (b" ", b"a"), (b"a", b"'"), (b"/", b"\n")]
    return Tokenizer(trained_vocabulary(merges, [], pattern))


def split(text: str, pattern: PatternName) -> list[str]:
    return [word for words in pretokenize(text, pattern=pattern) for word in words]


@fuzz
@given(text=texts, pattern=names)
def test_plain_split_equals_regex(text: str, pattern: PatternName) -> None:
    # `regex` knows other versions of Unicode: characters that its tables and ours see differently are left out.
    text = "".join(filter(same_in_regex, text))
    assert split(text, pattern) == regex.findall(REFERENCE[pattern], text)
    assert split(text, pattern) == regex.findall(PATTERNS[pattern].replace(r"\z", r"\Z"), text)


@cache
def same_in_regex(character: str) -> bool:
    from transformerlm.tokenizer import unicode_classes as ours

    tables = (
        (ours.LETTERS, r"\p{L}"), (ours.NUMBERS, r"\p{N}"), (ours.WHITE_SPACE, r"\s"), (ours.MARKS, r"\p{M}"),
        (ours.UPPERCASE, r"[\p{Lu}\p{Lt}]"), (ours.LOWERCASE, r"\p{Ll}"),
    )  # fmt: skip
    code = ord(character)
    return all(
        any(first <= code <= last for first, last in ours.parse_ranges(table)) == bool(regex.match(name, character))
        for table, name in tables
    )


@fuzz
@given(text=texts, pattern=names)
def test_ids_equal_tiktoken(text: str, pattern: PatternName) -> None:
    tokenizer = bare(pattern)
    reference = tiktoken.Encoding(
        name="bare",
        pat_str=REFERENCE[pattern],
        mergeable_ranks=dict(tokenizer.vocabulary.tokens),
        special_tokens={},
    )
    assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)


SHORT_PIECES = [
    *map(chr, range(128)),
    *" \n\t" * 30,
    *"\u3000\x85é中ſ²\udc80\ud800",
    *("'s", "'LL", "  ", "<|x|>", "x y", "\udce4\udcb8\udcad"),
]


@fuzz
@given(text=st.lists(st.sampled_from(SHORT_PIECES)).map("".join), pattern=names)
@example(text="a\n ", pattern="gpt2")  # white space before the last space
@example(text="\n\t b", pattern="cl100k")
def test_the_short_way_gives_the_same_ids(text: str, pattern: PatternName) -> None:
    tokenizer = bare(pattern).with_special_tokens(["<|x|>", "x y"])
    ids = tokenizer._plain.encode_short(text)
    if ids is not None:
        for allowed in ("all", "none"):
            assert ids.tolist() == tokenizer._plain.encode(text, tokenizer._special(allowed, "none")).tolist()


@pytest.mark.parametrize("text", ["Once upon a time, a ", " é\n中 x", "a", "", " ", "don't stop-me 12"])
def test_the_short_way_is_taken(text: str) -> None:
    assert bare("gpt2")._plain.encode_short(text) is not None


@fuzz
@given(text=broken_texts, pattern=names)
def test_compiled_ids_equal_the_plain_ones(text: bytes, pattern: PatternName) -> None:
    readiness.load("compiled_encoder")
    tokenizer = bare(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "SHORT_TEXT", -1)
        ids = tokenizer.encode(text).tolist()
    assert ids == list(tokenizer._plain.encode(text, tokenizer._special("all", "none")))


@fuzz
@given(text=broken_texts, pattern=names)
def test_compiled_words_equal_the_plain_ones(text: bytes, pattern: PatternName) -> None:
    from transformerlm.tokenizer.compiled_trainer import WordCounter
    from transformerlm.tokenizer.special_tokens import SpecialTokens
    from transformerlm.tokenizer.trainer import PlainCounter

    readiness.load("compiled_trainer")
    special = SpecialTokens({}, frozenset())
    plain, compiled = PlainCounter(special, pattern), WordCounter(special, 1, pattern)
    plain.count([text])
    compiled.count([text])
    nodes, counts = compiled.table.nodes()
    words: list[bytearray] = [bytearray() for _ in counts]
    for byte, _, _, word in nodes.tolist():
        words[word].append(byte)
    assert {bytes(word): int(count) for word, count in zip(words, counts, strict=True)} == plain.words()
    assert sorted(plain.words()) == sorted({to_bytes(word) for word in split(as_text(text), pattern)})


@pytest.mark.parametrize("pattern", ["cl100k", "o200k"])
def test_training_uses_the_pattern(pattern: PatternName) -> None:
    spec = TokenizerTrainingSpec(vocab_size=300, pattern=pattern, allow_smaller=True)
    tokenizer = train_tokenizer(["12345 12345 HTTPServer HTTPServer can't CAN'T\n\n  x"] * 9, spec)
    assert tokenizer.vocabulary.pattern == pattern
    assert all(len(token) <= 3 for token in tokenizer.vocabulary.tokens if token.isdigit())
    gpt2 = train_tokenizer(["x"], TokenizerTrainingSpec(vocab_size=300, allow_smaller=True))
    assert tokenizer.content_hash != gpt2.content_hash


@pytest.fixture(scope="module", params=["cl100k", "o200k"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    directory = tmp_path_factory.mktemp(request.param) / "tokenizer"
    tokenizer = train_tokenizer([STORY], TokenizerTrainingSpec(vocab_size=400, pattern=request.param))
    tokenizer.save(directory)
    return tokenizer, directory


class TestFiles:
    def test_every_form_reads_back_the_same(self, saved: tuple[Tokenizer, Path]) -> None:
        tokenizer, directory = saved
        pattern = tokenizer.vocabulary.pattern
        assert Tokenizer.load(directory).vocabulary == tokenizer.vocabulary
        assert Tokenizer.load(directory / "tokenizer.json").vocabulary == tokenizer.vocabulary
        ranks = directory / "ranks.tiktoken"
        read = Tokenizer.from_tiktoken(ranks, pattern=pattern, special_tokens=tokenizer.special_tokens)
        assert read.content_hash == tokenizer.content_hash

    @fuzz
    @given(text=texts)
    def test_tokenizers_gives_the_same_ids(self, saved: tuple[Tokenizer, Path], text: str) -> None:
        # Its tables are those of another version of Unicode.
        text = "".join(filter(same_in_regex, text))
        assert huggingface(saved[1]).encode(text).ids == saved[0].encode(text).tolist()


@cache
def huggingface(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_ranks_of_gpt2_read_as_its_own_files(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path / "gpt2")
    ranks = tmp_path / "gpt2" / "ranks.tiktoken"
    read = Tokenizer.from_tiktoken(ranks, pattern="gpt2", special_tokens=gpt2.special_tokens)
    assert read.content_hash == gpt2.content_hash


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("YQ==\n", "line 1: not base64 and a rank"),
        ("YQ== x\n", "line 1"),
        ("*** 1\n", "line 1: not base64"),
        ("YQ== 1\nYQ== 2\n", "line 2: .* twice"),
        ("", "256 of the 256 single bytes have no id"),
        (None, "never merge into 'abc'"),
    ],
)
def test_damaged_ranks_are_one_sentence(tmp_path: Path, lines: str | None, message: str) -> None:
    if lines is None:
        bytes_and_one = [*(bytes([value]) for value in range(256)), b"abc"]
        lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(bytes_and_one))
    (tmp_path / "ranks").write_text(lines)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_tiktoken(tmp_path / "ranks", pattern="cl100k")


def test_an_unknown_pattern_is_named(saved: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "special_tokens.json"):
        (tmp_path / name).write_bytes((saved[1] / name).read_bytes())
    (tmp_path / "pattern.txt").write_text("gpt9")
    with pytest.raises(UserError, match="'gpt9'; known are gpt2, cl100k, o200k"):
        Tokenizer.load(tmp_path)
