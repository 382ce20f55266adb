"""Text files as documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.documents import END_OF_TEXT_LINE, iterate_documents, list_files, open_local_documents
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
    plain = [text.replace("\r", "") for text in texts if END_OF_TEXT_LINE not in text] or ["x"]
    write(folder / "x.txt", "".join(f"{text}\n<|endoftext|>\n" for text in plain))
    assert list(iterate_documents([folder / "x.txt"])) == plain


def test_rows(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl", "\ufeff" + rows("one", "") + "\n  \n" + '{"id": 3, "text": "caf\\u00e9 \\ud83d\\ude00"}'
    )
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"body": "two"}\r\n'))
    assert list(iterate_documents([tmp_path / "a.jsonl"])) == ["one", "", "café 😀"]
    assert list(iterate_documents([tmp_path / "b.jsonl.gz"], text_field="body")) == ["two"]


@pytest.mark.parametrize("suffix", [".lines", ".lines.gz"])
def test_newline_shards(tmp_path: Path, suffix: str) -> None:
    data = "\ufeffone \\n\n\r\n\n two<|endoftext|>\r\n<|endoftext|>\nlast\x0b\u2028\x85".encode()
    path = write(tmp_path / f"x{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    assert list(iterate_documents([path])) == ["one \\n", " two<|endoftext|>", "<|endoftext|>", "last\x0b\u2028\x85"]


def write_parquet(path: Path, texts: list[str | None], *, column: str = "text", group: int = 7) -> Path:
    pq.write_table(
        pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())}), path, row_group_size=group
    )
    return path


def test_parquet(tmp_path: Path) -> None:
    texts = [f"row {i} é\n" * (i % 3) for i in range(30)]
    assert list(iterate_documents([write_parquet(tmp_path / "a.parquet", [*texts])])) == texts
    body = write_parquet(tmp_path / "b.parquet", [*texts], column="body")
    assert list(iterate_documents([body], text_field="body")) == texts
    with pytest.raises(UserError, match=r"b.parquet has no column 'text'; it has id, body"):
        list(iterate_documents([body]))
    with pytest.raises(UserError, match=r"c.parquet: the column 'text' holds NoneType"):
        list(iterate_documents([write_parquet(tmp_path / "c.parquet", ["a", None])]))
    for damaged in (b"PAR1", b"", body.read_bytes()[:-30]):
        with pytest.raises(UserError, match=r"d.parquet is not a sound Parquet file"):
            list(iterate_documents([write(tmp_path / "d.parquet", damaged)]))


def test_a_shard_can_be_read_from_any_document(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(20)]
    write(tmp_path / "a.jsonl.gz", gzip.compress(rows(*texts).replace("\n", "\n\n").encode()))
    write(tmp_path / "b.txt", "".join(f"{text}\n<|endoftext|>\n" for text in texts))
    write(tmp_path / "c.lines", "\n".join(texts))
    write_parquet(tmp_path / "d.parquet", [*texts])
    data = open_local_documents(tmp_path)
    assert len(data.shards) == 4
    for shard in data.shards:
        assert [list(shard.read(start)) for start in range(25)] == [texts[start:] for start in range(25)]


def test_a_changed_file_changes_the_identity(tmp_path: Path) -> None:
    for name, size in (("a.txt", 100), ("b.lines", 3 << 20)):
        write(tmp_path / "x" / name, bytes(i % 7 + 65 for i in range(size)))
    before = open_local_documents(tmp_path / "x").identity
    (tmp_path / "x").rename(tmp_path / "y")
    assert open_local_documents(tmp_path / "y").identity == before
    seen = {before, open_local_documents(tmp_path / "y", text_field="body").identity}
    for name, at in (("a.txt", 50), ("b.lines", 0), ("b.lines", -1)):
        data = bytearray((tmp_path / "y" / name).read_bytes())
        data[at] ^= 1
        write(tmp_path / "y" / name, bytes(data))
        seen.add(open_local_documents(tmp_path / "y").identity)
    (tmp_path / "y" / "a.txt").rename(tmp_path / "y" / "c.txt")
    seen.add(open_local_documents(tmp_path / "y").identity)
    write(tmp_path / "y" / "b.lines", (tmp_path / "y" / "b.lines").read_bytes() + b"x")
    seen.add(open_local_documents(tmp_path / "y").identity)
    assert len(seen) == 7


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
        ("x.jsonl", rows("a") + "[" * 100_000, "x.jsonl line 2 is not valid JSON"),
        ("x.jsonl", '{"text": "a", "id": ' + "1" * 5000 + "}", "x.jsonl line 1 is not valid JSON"),
        ("x.jsonl", rows("a") + "\n[1]\n", "x.jsonl line 3 has no field 'text': set text_field"),
        ("x.jsonl", '{"body": "a", "id": 1}\n', "x.jsonl line 1 has no field 'text'; it has body, id: set text_field"),
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
        ("x.csv", "x.csv is not one of"),
        ("empty", "empty holds no .jsonl"),
    ],
)
def test_bad_paths_are_refused_before_the_first_document(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path / "x.csv", "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        iterate_documents([tmp_path / name])


@pytest.mark.parametrize("flaw", ["cut off", "column", "field", "field.gz"])
def test_a_flaw_of_the_last_file_is_found_at_the_start(tmp_path: Path, flaw: str) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"text": ["x"] * 50}), tmp_path / name)
    last = tmp_path / "z.parquet"
    match flaw:
        case "cut off":
            last.write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
        case "column":
            pq.write_table(pa.table({"story": ["x"]}), last)
        case "field":
            last = tmp_path / "z.jsonl"
            last.write_text('{"story": "x"}\n')
        case _:
            last = tmp_path / "z.jsonl.gz"
            last.write_bytes(gzip.compress(b'{"story": "x"}\n'))
    with pytest.raises(UserError, match=last.name):
        open_local_documents(tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared real text is not here")
def test_real_text_is_the_same_in_both_formats() -> None:
    for split in ("train", "val"):
        texts = list(iterate_documents([SHARED / f"tinystories_{split}.txt"]))
        assert texts == list(iterate_documents([SHARED / f"tinystories_{split}.jsonl"]))
        assert len(texts) > 10
