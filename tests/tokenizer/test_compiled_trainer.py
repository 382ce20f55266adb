"""The compiled trainer against the plain one, which `test_trainer.py` holds against the naive one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.conftest import STORY
from tests.tokenizer.oracles import any_bytes, fuzz, naive_merges
from transformerlm.tokenizer import compiled_trainer, readiness, trainer
from transformerlm.tokenizer.compiled_trainer import WordCounter
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.trainer import PlainCounter, count_words, learn_merges, train_tokenizer
from transformerlm.tokenizer.vocabulary import Merge

SPECIAL = SpecialTokens({"<|endoftext|>": 0, "<|pad|>": 0}, frozenset())


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    readiness.load("compiled_trainer")


def compiled_merges(texts: Iterable[str | bytes], num_merges: int, threads: int = 1) -> list[Merge]:
    counter = WordCounter(SPECIAL, threads)
    counter.count(list(texts))
    return compiled_trainer.learn_merges(*counter.table.nodes(), num_merges, lambda stage, done: None)


def words_of(counter: WordCounter) -> dict[bytes, int]:
    nodes, counts = counter.table.nodes()
    words: list[bytearray] = [bytearray() for _ in counts]
    for byte, _, _, word in nodes.tolist():
        words[word].append(byte)
    return {bytes(word): int(count) for word, count in zip(words, counts, strict=True)}


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    "text",
    [
        STORY,
        "a" * 37 + " " + "a" * 5,
        "abab baba abba " * 9,
        "日本語のテキスト、日本の本。 Ελληνικά and русский",
        "".join(random.Random(1).choices("xyz \n", k=3000)),
        "z" + "".join(map(chr, range(300))) * 2,
        "",
        "a",
    ],
    ids=["story", "run", "ties", "scripts", "random", "bytes", "empty", "one"],
)
def test_merges_equal_the_naive_trainer(text: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_trainer, "PART", 100)
    assert compiled_merges([text], 150, threads) == naive_merges(count_words([text]), 150)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_merges_of_real_text(stories: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_trainer, "PART", 10_000)
    text = stories[:200_000]
    expected = learn_merges(count_words([text], SPECIAL.names), 1500)
    assert compiled_merges([text], 1500, threads) == expected
    assert compiled_merges(text.splitlines(keepends=True), 1500, threads) == learn_merges(
        count_words(text.splitlines(keepends=True), SPECIAL.names), 1500
    )


@fuzz
@given(texts=st.lists(any_bytes, max_size=5), threads=st.sampled_from([1, 2]))
def test_words_of_any_bytes(texts: list[bytes], threads: int) -> None:
    counter = WordCounter(SPECIAL, threads)
    counter.count(texts)
    expected = count_words(texts, SPECIAL.names)
    assert words_of(counter) == expected
    counter.count_words(expected)
    assert words_of(counter) == {word: 2 * count for word, count in expected.items()}


@fuzz
@given(st.dictionaries(st.text(alphabet="ab", max_size=12).map(str.encode), st.integers(1, 5), max_size=8))
def test_merges_of_any_words(words: dict[bytes, int]) -> None:
    words.pop(b"", None)
    counter = WordCounter(SPECIAL, 1)
    counter.count_words(words)
    found = compiled_trainer.learn_merges(*counter.table.nodes(), 40, lambda stage, done: None)
    assert found == naive_merges(words, 40)


def test_arrays_grow() -> None:
    # Many distinct words, long ones among them, and a word so long that the texts of its tokens outgrow their array.
    numbers = random.Random(3)
    text = (
        " ".join("".join(numbers.choices("abcdefgh", k=numbers.choice([3, 6, 20, 40]))) for _ in range(3000))
        + " longlonglong" * 40
        + " "
        + "xy" * 300_000
    )
    assert compiled_merges([text], 700) == learn_merges(count_words([text]), 700)


@pytest.mark.parametrize("threads", [1, 3])
def test_training_hands_over_and_stays_the_same(stories: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stories[:300_000].split("\n")
    spec = TokenizerTrainingSpec(vocab_size=700)
    plain = trained(texts, spec, 0, monkeypatch)
    for from_lot in (1, 4):
        assert trained(texts, spec, from_lot, monkeypatch, threads) == plain


@pytest.mark.parametrize("threads", [1, 3])
def test_rare_words_are_dropped_the_same(stories: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stories[:300_000].split("\n")
    spec = TokenizerTrainingSpec(vocab_size=500, max_words=300)
    plain = trained(texts, spec, 0, monkeypatch)
    assert plain[1] > 0
    for from_lot in (1, 3):
        assert trained(texts, spec, from_lot, monkeypatch, threads) == plain
    assert trained(texts, TokenizerTrainingSpec(vocab_size=500), 1, monkeypatch)[0] != plain[0]


def trained(
    texts: list[str], spec: TokenizerTrainingSpec, from_lot: int, patch: pytest.MonkeyPatch, threads: int = 1
) -> tuple[str, int]:
    """Hash and dropped occurrences, with the kernels taking over at the lot of that number (0 = never)."""
    lots: Iterator[int] = iter(range(1, 1000))
    patch.setattr(trainer, "LOT", 50_000)
    patch.setattr(compiled_trainer, "PART", 9_000)
    patch.setattr(readiness, "pays", lambda name, work: next(lots) == from_lot)
    told: dict[str, int] = {}
    tokenizer = train_tokenizer(texts, spec, progress=told.__setitem__, threads=threads)
    assert told["count"] == len(texts)
    assert told["merge"] == len(tokenizer.vocabulary.merges)
    return tokenizer.content_hash, told.get("dropped", 0)


@fuzz
@given(words=st.lists(st.sampled_from([b" a", b" b", b" c", b" a long word indeed", b" d"])), most=st.integers(1, 4))
def test_what_is_dropped(words: list[bytes], most: int) -> None:
    plain, compiled = PlainCounter(SPECIAL), WordCounter(SPECIAL, 1)
    plain.count([b"".join(words)])
    compiled.count([b"".join(words)])
    before = plain.words()
    if len(plain) <= most:
        return
    assert compiled.drop_rare(most) == plain.drop_rare(most) == before.total() - plain.words().total()
    assert words_of(compiled) == plain.words()
    assert len(plain) <= most
    assert all(
        count < min(plain.counts.values(), default=1 << 30)
        for word, count in before.items()
        if word not in plain.words()
    )
