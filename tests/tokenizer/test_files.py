from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken.load
import tokenizers
from hypothesis import given

from tests.tokenizer.oracles import GPT2_PATTERN, SHARED, any_text, fuzz
from trainkit import artifacts
from trainkit.errors import UserError
from transformerlm.tokenizer import files
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.vocabulary import BYTES, Vocabulary, token_from_name, token_name

BYTE_NAMES = [token_name(token) for token in BYTES]


@pytest.fixture(scope="module")
def saved(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "tokenizer"
    small.save(directory, about={"corpus": "a story"})
    return directory


@pytest.fixture(scope="module")
def huggingface(saved: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., Path]:
    """Write a directory of GPT-2's files from plain parts."""

    def write(vocab: Any = None, merges: str = "t h\nth e\n", special: Any = None) -> Path:
        if vocab is None:
            vocab = {name: index for index, name in enumerate([*BYTE_NAMES, "th", "the"])}
        (tmp_path / "vocab.json").write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), encoding="utf-8")
        (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
        if special is not None:
            (tmp_path / "special_tokens.json").write_text(json.dumps(special), encoding="utf-8")
        return tmp_path

    return write


def vocab_of(*names: str) -> dict[str, int]:
    return {name: index for index, name in enumerate([*BYTE_NAMES, *names])}


class TestWhatIsWritten:
    def test_loads_as_the_same_tokenizer_from_each_form(self, small: Tokenizer, saved: Path) -> None:
        for same in (
            Tokenizer.load(saved),
            Tokenizer.load(saved / "tokenizer.json"),
            Tokenizer.from_files(saved / "vocab.json", saved / "merges.txt", saved / "special_tokens.json"),
            Tokenizer.from_files(saved / "vocab.json", saved / "merges.txt"),
        ):
            assert same.content_hash == small.content_hash
            assert same.vocabulary == small.vocabulary

    def test_is_described_by_the_manifest(self, small: Tokenizer, saved: Path) -> None:
        manifest = artifacts.verify_directory(saved)
        assert manifest["content_hash"] == small.content_hash
        assert (manifest["kind"], manifest["vocab_size"], manifest["corpus"]) == ("tokenizer", 330, "a story")
        assert set(manifest["files"]) == {
            "vocab.json", "merges.txt", "special_tokens.json", "tokenizer.json", "ranks.tiktoken",
        }  # fmt: skip

    def test_is_the_same_to_the_byte_each_time(self, small: Tokenizer, saved: Path, tmp_path: Path) -> None:
        Tokenizer.load(saved).save(tmp_path / "again", about={"corpus": "a story"})
        for file in saved.iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    @fuzz
    @given(text=any_text)
    def test_has_the_same_ids_in_tokenizers(
        self, small: Tokenizer, huggingface: tokenizers.Tokenizer, text: str
    ) -> None:
        assert huggingface.encode(text).ids == small.encode(text).tolist()

    def test_decodes_the_same_in_tokenizers(self, small: Tokenizer, huggingface: tokenizers.Tokenizer) -> None:
        ids = small.encode("naïve 東京<|endoftext|> 😀 cat's<|mask|>").tolist()
        assert huggingface.decode(ids, skip_special_tokens=False) == small.decode(ids)
        assert huggingface.get_vocab_size() == small.vocab_size

    def test_has_the_same_ids_in_tiktoken(self, small: Tokenizer, saved: Path, stories: str) -> None:
        reference = tiktoken.Encoding(
            name="saved",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(saved / "ranks.tiktoken")),
            special_tokens=json.loads((saved / "special_tokens.json").read_text()),
            explicit_n_vocab=small.vocab_size,
        )
        text = stories[:100_000] + "naïve 東京<|pad|>"
        assert reference.encode(text, allowed_special="all") == small.encode(text).tolist()

    def test_gpt2_extended_keeps_its_ids_everywhere(self, gpt2: Tokenizer, stories: str, tmp_path: Path) -> None:
        extended = gpt2.with_special_tokens(["<|endoftext|>", "<|pad|>", "<|mask|>"])
        extended.save(tmp_path / "t")
        text = stories[:20_000] + "<|endoftext|><|mask|> ¡ñandú!"
        expected = extended.encode(text).tolist()
        assert Tokenizer.load(tmp_path / "t").encode(text).tolist() == expected
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).encode(text).ids == expected
        assert tiktoken.load.load_tiktoken_bpe(str(tmp_path / "t" / "ranks.tiktoken")) == gpt2.vocabulary.tokens

    def test_gaps_between_ids_survive(self, small: Tokenizer, tmp_path: Path) -> None:
        vocabulary = Vocabulary(
            small.vocabulary.tokens, small.vocabulary.merges, {"<|endoftext|>": 400, "<|pad|>": 1000}
        )
        tokenizer = Tokenizer(vocabulary)
        tokenizer.save(tmp_path / "t")
        loaded = Tokenizer.load(tmp_path / "t")
        assert loaded.vocab_size == 1001
        assert loaded.byte_lengths()[350] == 0
        with pytest.raises(UserError, match="id 350 is not in the vocabulary"):
            loaded.decode([350])
        expected = loaded.encode("time<|pad|>").tolist()
        assert expected[-1] == 1000
        assert (
            tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).encode("time<|pad|>").ids == expected
        )


class TestPublishing:
    def test_an_existing_directory_is_refused(self, small: Tokenizer, saved: Path) -> None:
        with pytest.raises(UserError, match="exists already"):
            small.save(saved)

    def test_nothing_is_left_of_an_interrupted_save(
        self, small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for stop_at in ("write", "seal", "rename"):

            def hook(stage: str, stop_at: str = stop_at) -> None:
                if stage == stop_at:
                    raise KeyboardInterrupt

            monkeypatch.setattr(artifacts, "step_hook", hook)
            with pytest.raises(KeyboardInterrupt):
                small.save(tmp_path / "t")
            assert list(tmp_path.iterdir()) == []

    def test_a_damaged_directory_is_named(self, small: Tokenizer, tmp_path: Path) -> None:
        small.save(tmp_path / "t")
        merges = tmp_path / "t" / "merges.txt"
        merges.write_bytes(merges.read_bytes().replace(b"h e", b"e h"))
        with pytest.raises(UserError, match=r"damaged.*merges\.txt"):
            Tokenizer.load(tmp_path / "t")


class TestForeignFiles:
    def test_gpt2(self, gpt2: Tokenizer) -> None:
        assert gpt2.vocab_size == 50257
        assert gpt2.special_tokens == {"<|endoftext|>": 50256}
        assert gpt2.encode("!").tolist() == [0]  # ids of single bytes are not their values
        assert gpt2.encode("Hello world<|endoftext|>").tolist() == [15496, 995, 50256]
        assert Tokenizer.from_files(SHARED / "gpt2" / "vocab.json", SHARED / "gpt2" / "merges.txt").vocabulary == (
            gpt2.vocabulary
        )

    @pytest.mark.parametrize(
        "special",
        [
            ["<|endoftext|>", "[PAD]"],
            {"<|endoftext|>": 258, "[PAD]": 259},
            {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": {"content": "[PAD]"}},
        ],
        ids=["list", "ids", "roles"],
    )
    def test_forms_of_the_special_tokens_file(self, parts: Callable[..., Path], special: Any) -> None:
        for vocab in (vocab_of("th", "the"), vocab_of("th", "the", "<|endoftext|>", "[PAD]")):
            tokenizer = Tokenizer.load(parts(vocab, special=special))
            assert tokenizer.special_tokens == {"<|endoftext|>": 258, "[PAD]": 259}

    def test_an_empty_list_of_special_tokens(self, parts: Callable[..., Path]) -> None:
        for empty in ([], {}):
            assert Tokenizer.load(parts(special=empty)).special_tokens == {}

    def test_special_tokens_without_a_list(self, parts: Callable[..., Path]) -> None:
        tokenizer = Tokenizer.load(parts(vocab_of("th", "the", "<|endoftext|>", "[EOS]", "<pad>")))
        assert tokenizer.special_tokens == {"<|endoftext|>": 258, "[EOS]": 259, "<pad>": 260}

    def test_a_learned_token_that_looks_special_is_not(self, parts: Callable[..., Path]) -> None:
        tokenizer = Tokenizer.load(parts(vocab_of("[-", "[-]"), "[ -\n[- ]\n"))
        assert tokenizer.special_tokens == {}
        assert tokenizer.encode("[-]").tolist() == [257]

    def test_merges_may_hold_number_signs_and_line_ends_of_windows(self, parts: Callable[..., Path]) -> None:
        for merges in ("# #\n## #\n", "#version: 0.2\n# #\n## #", "#version: 0.2\r\n# #\r\n## #\r\n"):
            assert Tokenizer.load(parts(vocab_of("##", "###"), merges)).encode("###").tolist() == [257]

    def test_ids_in_any_order(self, parts: Callable[..., Path]) -> None:
        vocab = {name: 300 - index for index, name in enumerate(vocab_of("th", "the"))}
        tokenizer = Tokenizer.load(parts(vocab))
        assert tokenizer.encode("the th").tolist() == [vocab["the"], vocab["Ġ"], vocab["th"]]

    def test_tokenizer_json_of_older_versions_writes_merges_as_strings(self, saved: Path, tmp_path: Path) -> None:
        data = json.loads((saved / "tokenizer.json").read_text())
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        assert Tokenizer.load(tmp_path).content_hash == Tokenizer.load(saved).content_hash

    def test_ranks_are_not_written_where_ids_do_not_follow_the_merges(
        self, parts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        directory = tmp_path_factory.mktemp("out") / "t"
        Tokenizer.load(parts(vocab_of("the", "th"))).save(directory)
        assert not (directory / "ranks.tiktoken").exists()
        assert (directory / "tokenizer.json").exists()


def test_names_of_tokens_are_gpt2s() -> None:
    assert token_name(b" the\n") == "ĠtheĊ"
    assert len(set(BYTE_NAMES)) == 256
    assert all(token_from_name(token_name(token)) == token for token in BYTES)


class TestBadFiles:
    """One sentence each, which names the file."""

    @pytest.mark.parametrize(
        ("vocab", "merges", "special", "message"),
        [
            (vocab_of("th"), "t h\nth e\n", None, r"merge 2 \(th e\) does not fit .* no token 'the'"),
            (vocab_of("th"), "t h\nxy z\n", None, r"merge 2 \(xy z\) does not fit"),
            (vocab_of("th", "the"), "t h\n", None, "no merge makes 1 of the tokens, the first is 'the'"),
            (vocab_of("th"), "t h\nt h\n", None, "a merge is listed twice"),
            (vocab_of("th"), "t h e\n", None, r"merge 1 \(t h e\) is not a pair"),
            (vocab_of("th"), "t\n", None, r"merge 1 \(t\) is not a pair"),
            (vocab_of("th"), "t  h\n", None, "merge 1 .* is not a pair"),
            (vocab_of("th"), "t 字\n", None, "merge 1 .* is not a pair"),
            ({**vocab_of("th"), "th": 5}, "t h\n", None, "have the same id 5"),
            ({**vocab_of("th"), "th": -1}, "t h\n", None, "id -1, outside"),
            ({**vocab_of("th"), "th": 10**12}, "t h\n", None, "id 1000000000000, outside"),
            ({**vocab_of("th"), "th": "5"}, "t h\n", None, "'5' is not an id"),
            ({**vocab_of("th"), "th": True}, "t h\n", None, "True is not an id"),
            (dict(list(vocab_of().items())[1:]), "", None, "1 of the 256 single bytes have no id, the first is 0x00"),
            (vocab_of("字"), "", None, "'字' holds characters that stand for no byte"),
            ('{"a": 1, "a": 2}', "", None, "'a' appears twice"),
            ("[1]", "", None, "not a vocabulary"),
            ("{", "", None, "not valid JSON"),
            ("[" * 100_000, "", None, "not valid JSON"),
            (vocab_of(), "", [""], "a special token is empty"),
            (vocab_of(), "", ["<s>", "<s>"], "'<s>' is listed twice"),
            (vocab_of(), "", ["x"], "'x' is a single byte"),
            (vocab_of("th"), "t h\n", {"th": 400}, "'th' has two ids, 256 and 400"),
            (vocab_of("th"), "t h\n", ["th"], "no token 'th'"),
            (vocab_of(), "", {"<s>": 5}, "have the same id 5"),
            (vocab_of(), "", 5, "not a list of special tokens"),
            (vocab_of(), "", {"a": None}, "not a list of special tokens"),
            (vocab_of(), "", {"a": {"b": 1}}, "not a list of special tokens"),
            (vocab_of(), "", {"a": ["<s>"]}, "not a list of special tokens"),
            (vocab_of(), "", [["<s>"]], "not a list of special tokens"),
        ],
    )
    def test_gpt2_files(self, parts: Callable[..., Path], vocab: Any, merges: str, special: Any, message: str) -> None:
        directory = parts(vocab, merges, special)
        with pytest.raises(UserError, match=message) as caught:
            Tokenizer.load(directory)
        assert str(directory) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
            Tokenizer.load(tmp_path / "nowhere")
        with pytest.raises(UserError, match="holds no tokenizer"):
            Tokenizer.load(tmp_path)
        with pytest.raises(UserError, match=r"cannot read .*v\.json: No such file"):
            Tokenizer.from_files(tmp_path / "v.json", tmp_path / "m.txt")

    def test_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(b"\xff\x00")
        with pytest.raises(UserError, match="not a text file in UTF-8"):
            Tokenizer.load(tmp_path)
        with pytest.raises(UserError, match="cannot read"):
            Tokenizer.from_files(tmp_path, tmp_path)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("model", "type"), "WordPiece"),
            (("model", "dropout"), 0.1),
            (("model", "ignore_merges"), True),
            (("model", "byte_fallback"), True),
            (("model", "end_of_word_suffix"), "</w>"),
            (("model", "continuing_subword_prefix"), "##"),
            (("normalizer",), {"type": "NFC"}),
            (("pre_tokenizer",), {"type": "Metaspace"}),
            (("pre_tokenizer",), None),
            (("pre_tokenizer", "add_prefix_space"), True),
            (("pre_tokenizer", "use_regex"), False),
            (("added_tokens",), [{"id": 329, "content": "<|mask|>", "lstrip": True}]),
        ],
    )
    def test_tokenizer_json_with_other_settings(
        self, saved: Path, tmp_path: Path, path: tuple[str, ...], value: Any
    ) -> None:
        data = json.loads((saved / "tokenizer.json").read_text())
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match="is not supported"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        "data",
        [[], {}, {"model": 3}, {"model": {"type": "BPE"}}, {"model": {"vocab": [], "merges": []}}, {"model": None}],
    )
    def test_what_is_no_tokenizer_json(self, tmp_path: Path, data: Any) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(path)


def test_every_form_that_is_listed_is_written(saved: Path) -> None:
    assert {files.VOCAB, files.MERGES, files.SPECIAL_TOKENS, files.TOKENIZER_JSON, files.TIKTOKEN} <= {
        file.name for file in saved.iterdir()
    }
