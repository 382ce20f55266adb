"""The compiled kernels against the plain path, which the other tests hold against tiktoken and naive references."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.oracles import TRICKY, any_bytes, any_text, fuzz, tiktoken_of
from trainkit.errors import UserError
from transformerlm.tokenizer import compiled_encoder, readiness, streams
from transformerlm.tokenizer import tokenizer as tokenizer_module
from transformerlm.tokenizer.compiled_encoder import CompiledEncoder, WordCache
from transformerlm.tokenizer.kernels import encoding, merging
from transformerlm.tokenizer.tokenizer import Tokenizer

SPECIAL = ["<|pad|>", "<|mask|>", "<|endoftext|>more", "a b", "中文€"]
PIECES = [piece.encode() for piece in (*TRICKY, *SPECIAL, "<|", "<|endoftext|>", "the", " the", "ll")]

documents = st.one_of(
    any_bytes,
    st.lists(st.sampled_from(PIECES), max_size=100).map(b"".join),
    st.lists(st.sampled_from(b"a'ls \n1-"), min_size=50, max_size=300).map(bytes),
)


@pytest.fixture(scope="module", autouse=True)
def always_compiled() -> Iterator[None]:
    readiness.load("compiled_encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "SHORT_TEXT", -1)
        yield


@pytest.fixture(scope="module")
def special(gpt2: Tokenizer) -> Tokenizer:
    return gpt2.with_special_tokens(SPECIAL)


@cache
def tiktoken_of_gpt2(gpt2: Tokenizer) -> tiktoken.Encoding:
    """Made once: tiktoken takes a while to read its ranks."""
    return tiktoken_of(gpt2)


def plain(tokenizer: Tokenizer, text: str | bytes, allowed: tokenizer_module.SpecialNames = "all") -> list[int]:
    return list(tokenizer._plain.encode(text, tokenizer._special(allowed, "none")))


class TestSameIds:
    @fuzz
    @given(text=documents, allowed=st.sampled_from(["all", "none", frozenset(["<|pad|>", "a b"])]))
    def test_bytes(self, special: Tokenizer, text: bytes, allowed: tokenizer_module.SpecialNames) -> None:
        ids = special.encode(text, allowed_special=allowed)
        assert ids.dtype == special.dtype
        assert ids.tolist() == plain(special, text, allowed)
        assert special.decode_bytes(ids) == text

    @fuzz
    @given(text=any_text)
    def test_text(self, gpt2: Tokenizer, text: str) -> None:
        assert gpt2.encode(text).tolist() == tiktoken_of_gpt2(gpt2).encode(text, allowed_special="all")

    @fuzz
    @given(texts=st.lists(documents, max_size=8), allowed=st.sampled_from(["all", "none"]))
    def test_batch(self, special: Tokenizer, texts: list[bytes], allowed: tokenizer_module.SpecialNames) -> None:
        batch = special.encode_batch(texts, allowed_special=allowed)
        assert [ids.tolist() for ids in batch] == [plain(special, text, allowed) for text in texts]

    @fuzz
    @given(texts=st.lists(documents, min_size=1, max_size=8), threads=st.sampled_from([2, 4]))
    def test_threads(self, special: Tokenizer, texts: list[bytes], threads: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled_encoder, "SMALLEST_PART", 40)
            assert special.encode(b"".join(texts), threads=threads).tolist() == plain(special, b"".join(texts))
            batch = special.encode_batch(texts, threads=threads)
            assert [ids.tolist() for ids in batch] == [plain(special, text) for text in texts]

    @pytest.mark.parametrize("threads", [1, 2, 4])
    def test_real_text_in_tiktoken(self, gpt2: Tokenizer, stories: str, threads: int) -> None:
        sources = sorted(Path(__file__).parents[2].glob("t*/**/*.py"))
        code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
        for text in (stories, code, stories.upper(), stories[::-1], stories.replace("e", "é中")):
            expected = tiktoken_of_gpt2(gpt2).encode(text, allowed_special="all")
            assert gpt2.encode(text, threads=threads).tolist() == expected

    @pytest.mark.parametrize(
        "character", ["a", "1", "-", " ", "\n", "é", "中", "\u3000", "😀", "\u00a0", "'", "\ud800"]
    )
    def test_long_runs_of_one_kind(self, gpt2: Tokenizer, character: str) -> None:
        for text in (character * 100_000, "x " + character * 99_999 + " x"):
            assert gpt2.encode(text).tolist() == plain(gpt2, text)

    def test_ids_that_need_32_bits(self, small: Tokenizer, stories: str) -> None:
        wide = CompiledEncoder(small.vocabulary, np.dtype(np.uint32))
        ids = wide.encode(stories, small._special("all", "none"), 1)
        assert ids.dtype == np.uint32
        assert ids.tolist() == plain(small, stories)

    def test_more_tokens_than_a_key_can_hold(self, small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merging, "MAX_TOKENS", 256)
        with pytest.raises(UserError, match=r"of which 256 can be told apart.*tokenizer\.vocab_size"):
            CompiledEncoder(small.vocabulary, np.dtype(np.uint32))

    def test_repeated_merge_results(self) -> None:
        # Two merges may make the same token; ranks then differ from the order of tokens.
        merges = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"d"), (b"d", b"abc")]
        tokens = {bytes([value]): value for value in range(256)}
        for left, right in merges:
            tokens.setdefault(left + right, len(tokens))
        tokenizer = Tokenizer(tokenizer_module.Vocabulary(tokens, tuple(merges)))
        for text in ("abcd", "dabc", "abcabcd", "bcabcdabcdd", "aabcc"):
            assert tokenizer.encode(text).tolist() == plain(tokenizer, text)


class TestMemory:
    @pytest.mark.parametrize("most_slots", [64, 1 << 21])
    def test_a_full_cache_is_emptied(
        self, gpt2: Tokenizer, stories: str, monkeypatch: pytest.MonkeyPatch, most_slots: int
    ) -> None:
        monkeypatch.setattr(compiled_encoder, "FIRST_SLOTS", 16)
        monkeypatch.setattr(compiled_encoder, "MOST_SLOTS", most_slots)
        monkeypatch.setattr(compiled_encoder, "FIRST_ARENA", 5 * encoding.LONGEST_REMEMBERED + 100)
        monkeypatch.setattr(compiled_encoder, "MOST_ARENA", 5 * encoding.LONGEST_REMEMBERED + 100)
        fresh = Tokenizer(gpt2.vocabulary)
        text = stories[:100_000] + "".join(f" неизвестноеслово{number:x}" for number in range(2000))
        assert fresh.encode(text).tolist() == plain(gpt2, text)
        [words] = fresh._compiled._caches
        assert 0 < 2 * words.used[0] <= len(words.slots) + 2
        assert len(words.slots) <= max(64, most_slots)

    def test_files_in_pieces(
        self, special: Tokenizer, stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [stories[:50_000].encode(), b"a " * 3000 + b"\xff\xe4\xb8", b"", b"a b" * 2000, b"x" * 5000]
        paths = [tmp_path / str(number) for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text)
        for piece in (1, 7, 1000):
            monkeypatch.setattr(streams, "PIECE", piece)
            ids = np.concatenate(list(special.encode_files(paths)))
            assert ids.tolist() == [number for text in texts for number in plain(special, text)]
        with pytest.raises(UserError, match="cannot read"):
            list(special.encode_files([tmp_path / "missing"]))

    def test_threads_of_the_caller_do_not_disturb_each_other(self, gpt2: Tokenizer, stories: str) -> None:
        expected = plain(gpt2, stories)
        results: list[bool] = []
        workers = [
            threading.Thread(target=lambda: results.append(gpt2.encode(stories).tolist() == expected)) for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert results == [True] * 4

    def test_nothing_is_read_beyond_the_end(self, gpt2: Tokenizer) -> None:
        # What follows in memory must not matter: letters here, which would go on with the last word.
        for size in (*range(1, 140), 4000, 4096):
            text = (b"word " * 1000)[:size]
            whole = np.frombuffer(text + b"abcdefgh" * 50, np.uint8)
            inside = compiled_encoder.View(whole, whole.ctypes.data, size)
            ids, _ = gpt2._compiled._encode_segments(inside, np.array([[0, size]], np.int64), 1)
            assert ids.tolist() == plain(gpt2, text)


class TestDecode:
    def test_long_rows(self, gpt2: Tokenizer, stories: str) -> None:
        ids = gpt2.encode(stories)
        for row in (ids, ids.astype(np.int64), ids.astype(np.int32), ids.tolist()):
            assert gpt2.decode(row) == stories
        assert gpt2.decode_batch([ids[:100], ids[100:]]) == [gpt2.decode(ids[:100]), gpt2.decode(ids[100:])]

    @pytest.mark.parametrize("bad", [-1, 60_000, 1 << 40])
    def test_an_id_out_of_range(self, gpt2: Tokenizer, bad: int) -> None:
        with pytest.raises(UserError, match=f"the id {bad} is not in the vocabulary"):
            gpt2.decode([1] * 1000 + [bad])


def test_a_disallowed_special_token_is_named(special: Tokenizer) -> None:
    for text in ("one <|pad|>", "one <|pad|>" + "x " * 1000):
        for encode in (special.encode, special.count, lambda text, **names: special.encode_batch([text], **names)):
            with pytest.raises(UserError, match=r"holds the special token '<\|pad\|>'"):
                encode(text, allowed_special="none", disallowed_special="all")
        with pytest.raises(UserError, match=r"'<\|pad\|>'"):
            list(special._plain.encode(text, special._special("none", "all")))
    assert special.encode("a <|mask|>", disallowed_special=["<|pad|>"]).tolist() == plain(special, "a <|mask|>")


class TestStartUp:
    def test_short_texts_import_no_numba(self) -> None:
        code = (
            "import sys; from transformerlm.tokenizer.tokenizer import Tokenizer, Vocabulary\n"
            "from transformerlm.tokenizer.vocabulary import trained_vocabulary\n"
            "tokenizer = Tokenizer(trained_vocabulary([(b'a', b'b')], ['<|endoftext|>']))\n"
            "assert tokenizer.decode(tokenizer.encode('ab' * 5000)) == 'ab' * 5000\n"
            "assert tokenizer.encode_batch(['ab'])[0].tolist() == [256]\n"
            "assert 'numba' not in sys.modules"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

    def test_loading_pays_after_as_much_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(readiness, "_loaded", {})
        monkeypatch.setattr(readiness, "_plain_work", {})
        assert not readiness.pays("compiled_encoder", readiness.LOADING_COST - 1)
        assert readiness.pays("compiled_encoder", 1)

    def test_compiles_once_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(readiness, "_loaded", {})
        monkeypatch.setattr(readiness, "cache_directory", lambda: tmp_path)
        compiled: list[bool] = []
        monkeypatch.setattr(compiled_encoder, "warm_up", lambda: compiled.append(True))
        readiness.load("compiled_encoder")
        begun, done = capsys.readouterr().err.splitlines()
        assert "compiling" in begun
        assert "encoding" in begun
        assert str(tmp_path) in begun
        assert done.startswith("compiled them in ")
        monkeypatch.setattr(readiness, "_loaded", {})
        readiness.load("compiled_encoder")
        assert compiled == [True]
        assert capsys.readouterr().err == ""

    def test_the_cache_may_be_anywhere_writable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        readiness.cache_directory.cache_clear()
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
        assert readiness.cache_directory().parent == tmp_path / "mine"
        readiness.cache_directory.cache_clear()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
        assert readiness.cache_directory().is_dir()
        readiness.cache_directory.cache_clear()


def test_growing_keeps_every_word() -> None:
    words = WordCache()
    words.slots[5] = [1, 1 << 56, 2, 3]
    words.make_room(encoding.NEEDS_SLOTS)
    assert words.slots.any(axis=1).sum() == 1
    assert len(words.slots) == 4 * compiled_encoder.FIRST_SLOTS
