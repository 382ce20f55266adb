"""Text files as documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.documents import iterate_documents, list_files
from trainkit.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo", ["one\ntwo"]),
        ("one\n", ["one\n"]),
        ("\n one \n\n", ["\n one \n\n"]),
        ("a\n<|endoftext|>\nb\n", ["a", "b"]),
        ("a\n<|endoftext|>\nb\n<|endoftext|>\n", ["a", "b"]),
        ("a\n<|endoftext|>\nb\n<|endoftext|>", ["a", "b"]),
        ("<|endoftext|>\n\na\n\n<|endoftext|>\n<|endoftext|>\nb", ["\na\n", "b"]),
        ("a\r\nb\r\n<|endoftext|>\r\nc\r\n", ["a\r\nb", "c"]),
        ("a <|endoftext|>\n<|endoftext|> b\n", ["a <|endoftext|>\n<|endoftext|> b\n"]),
        ("\ufeffa", ["a"]),
        ("\ufeff<|endoftext|>\na\ufeff", ["a\ufeff"]),
        ("a\u2028b\x0b\x0cc\x85d\n", ["a\u2028b\x0b\x0cc\x85d\n"]),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_files(tmp_path: Path, content: str, expected: list[str], suffix: str) -> None:
    data = content.encode()
    path = write(tmp_path / f"x{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    assert list(iterate_documents([path])) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")).filter(lambda text: text.strip("\r\n<")), min_size=1))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("text")
    write(folder / "x.jsonl", rows(*texts))
    assert list(iterate_documents([folder / "x.jsonl"])) == texts
    plain = [text.replace("\r", "") for text in texts]
    write(folder / "x.txt", "".join(f"{text}\n<|endoftext|>\n" for text in plain))
    assert list(iterate_documents([folder / "x.txt"])) == plain


def test_rows(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl", "\ufeff" + rows("one", "") + "\n  \n" + '{"id": 3, "text": "caf\\u00e9 \\ud83d\\ude00"}'
    )
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"body": "two"}\r\n'))
    assert list(iterate_documents([tmp_path / "a.jsonl"])) == ["one", "", "café 😀"]
    assert list(iterate_documents([tmp_path / "b.jsonl.gz"], text_field="body")) == ["two"]


def test_separator_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "a\n---\nb\n<|endoftext|>\n")
    assert list(iterate_documents([path], separator="---")) == ["a", "b\n<|endoftext|>"]


def test_directories_are_sorted_and_other_files_ignored(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/y.txt.gz", "c.md", ".hidden.txt", ".cache/x.txt"):
        content = rows(name) if name.endswith("jsonl") else name
        write(tmp_path / name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    assert list(iterate_documents([tmp_path, tmp_path / "b.txt"])) == ["a/y.txt.gz", "a/z.jsonl", "b.txt", "b.txt"]
    assert [path.name for path in list_files([tmp_path])] == ["y.txt.gz", "z.jsonl", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", rows("a") + '{"text": 1\n', "x.jsonl line 2 is not valid JSON"),
        ("x.jsonl", rows("a") + "\n[1]\n", "x.jsonl line 3 has no field 'text': name"),
        ("x.jsonl", '{"body": "a", "id": 1}\n', "x.jsonl line 1 has no field 'text'; it has body, id: name"),
        ("x.jsonl", '{"text": 5}\n', "x.jsonl line 1: the field 'text' is int"),
        ("x.jsonl", '{"text": null}\n', "x.jsonl line 1: the field 'text' is NoneType"),
        ("x.jsonl", '{"text": "\\ud800"}\n', "x.jsonl line 1 holds half of a surrogate pair"),
        ("x.jsonl", rows("a").encode() + b'{"text": "\xff"}\n', "x.jsonl is not valid UTF-8 in line 2"),
        ("x.txt", b"a\nb\n<|endoftext|>\nc\n\xc3\n", "x.txt is not valid UTF-8 in line 5"),
        ("x.txt", b"", "x.txt holds no document"),
        ("x.txt", b"<|endoftext|>\n", "x.txt holds no document"),
        ("x.jsonl", b"\n", "x.jsonl holds no document"),
        ("x.txt.gz", b"plain", "x.txt.gz is not a complete gzip file"),
        ("x.txt.gz", gzip.compress(b"hello")[:-3], "x.txt.gz is not a complete gzip file"),
        ("x.txt.gz", gzip.compress(b"hello" * 99)[:-12] + bytes(12), "x.txt.gz is not a complete gzip file"),
    ],
)
def test_bad_content_is_one_sentence(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        list(iterate_documents([path]))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.txt", "none.txt does not exist"),
        ("x.parquet", "x.parquet is not one of"),
        ("empty", "empty holds no .jsonl"),
    ],
)
def test_bad_paths_are_refused_before_the_first_document(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path / "x.parquet", "PAR1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        iterate_documents([tmp_path / name])


@pytest.mark.skipif(not SHARED.exists(), reason="the shared real text is not here")
def test_real_text_is_the_same_in_both_formats() -> None:
    for split in ("train", "val"):
        texts = list(iterate_documents([SHARED / f"tinystories_{split}.txt"]))
        assert texts == list(iterate_documents([SHARED / f"tinystories_{split}.jsonl"]))
        assert len(texts) > 10
