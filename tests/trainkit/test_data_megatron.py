"""Token files: their bytes against an independent writer, what a reader sees, and every kind of damage refused."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit import artifacts
from trainkit.data.megatron import IndexedTokens, bin_path, idx_path, smallest_dtype, verify
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.token_manifest import manifest_path
from trainkit.errors import UserError

CODES = {
    "uint8": (1, "B"),
    "int8": (2, "b"),
    "int16": (3, "h"),
    "int32": (4, "i"),
    "int64": (5, "q"),
    "uint16": (8, "H"),
}
SUFFIXES = (".bin", ".idx", ".json")


def layout(sequences: list[list[int]], document_indices: list[int], dtype: str) -> tuple[bytes, bytes]:
    """`.bin` and `.idx` straight from the description of the format."""
    code, letter = CODES[dtype]
    size = struct.calcsize(letter)
    lengths = [len(sequence) for sequence in sequences]
    pointers = [0, *accumulate(length * size for length in lengths)][: len(lengths)]
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(document_indices))
    idx += struct.pack(f"<{len(lengths)}i", *lengths)
    idx += struct.pack(f"<{len(lengths)}q", *pointers)
    idx += struct.pack(f"<{len(document_indices)}q", *document_indices)
    return b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences), idx


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16", **facts: str) -> IndexedTokens:
    with IndexedWriter(prefix, dtype, **facts) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64), text_bytes=2 * len(document))
    return IndexedTokens.open(prefix)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


documents_of = {
    name: st.lists(st.lists(st.integers(np.iinfo(name).min, np.iinfo(name).max), max_size=9), min_size=1, max_size=9)
    for name in CODES
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CODES)).flatmap(lambda name: st.tuples(st.just(name), documents_of[name])),
    st.lists(st.integers(1, 4), max_size=9),
)
def test_bytes_and_round_trip(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, list[list[int]]], cuts: list[int]
):
    dtype, documents = case
    if not any(documents):
        documents = [*documents, [1]]
    prefix = tmp_path_factory.mktemp("data") / "with.dots"
    with IndexedWriter(prefix, dtype, tokenizer="abc", source={"kind": "test"}) as writer:
        rest = list(documents)
        for cut in [*cuts, len(documents)]:  # any division into calls of `add` gives the same files
            group, rest = rest[:cut], rest[cut:]
            flat = np.array([token for document in group for token in document], dtype=np.int64)
            writer.add(flat, np.array([len(document) for document in group], dtype=np.int64), text_bytes=len(flat))
    expected = layout(documents, list(range(len(documents) + 1)), dtype)
    assert (bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()) == expected

    data = IndexedTokens.open(prefix)
    assert data.tokens.dtype == dtype and not data.tokens.flags.writeable
    assert len(data) == len(documents)
    assert [data.document(i).tolist() for i in range(len(data))] == documents
    assert data.offsets.tolist() == [0, *accumulate(map(len, documents))]
    flat = [token for document in documents for token in document]
    assert data.tokens.tolist() == flat
    manifest = verify(prefix)
    assert (manifest.tokens, manifest.documents, manifest.text_bytes) == (len(flat), len(documents), len(flat))
    assert (manifest.min_token, manifest.max_token) == (min(0, *flat, 0), max(0, *flat, 0))
    assert (manifest.tokenizer, manifest.source) == ("abc", {"kind": "test"})
    manifest_path(prefix).unlink()
    assert IndexedTokens.open(prefix).token_range == data.token_range


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4), min_size=1, max_size=6))
def test_documents_of_several_sequences(tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]]):
    """Megatron-LM can cut a document into sentences; a document may even have none."""
    documents = [*documents, [[1]]]
    prefix = tmp_path_factory.mktemp("data") / "x"
    indices = [0, *accumulate(map(len, documents))]
    data, index = layout([sequence for document in documents for sequence in document], indices, "int32")
    bin_path(prefix).write_bytes(data)
    idx_path(prefix).write_bytes(index)
    opened = IndexedTokens.open(prefix)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    assert [opened.document(i).tolist() for i in range(len(opened))] == flat
    assert opened.offsets.tolist() == [0, *accumulate(map(len, flat))]
    assert opened.manifest is None and len(opened.identity) == 64


def test_the_content_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The passes over index and tokens go chunk by chunk: chunk borders must not show."""
    for module in ("megatron", "megatron_writer"):
        monkeypatch.setattr(f"trainkit.data.{module}.CHUNK", 7)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 100, size=n).tolist() for n in rng.integers(0, 5, size=50)]
    data = write(tmp_path / "x", documents)
    assert idx_path(data.prefix).read_bytes() == layout(documents, list(range(51)), "uint16")[1]
    manifest_path(data.prefix).unlink()
    assert IndexedTokens.open(data.prefix).token_range == (0, max(max(d, default=0) for d in documents))
    for field in range(34, idx_path(data.prefix).stat().st_size, 3):
        damaged = bytearray(idx_path(data.prefix).read_bytes())
        damaged[field] ^= 0x10
        idx_path(tmp_path / "y").write_bytes(damaged)
        bin_path(tmp_path / "y").write_bytes(bin_path(data.prefix).read_bytes())
        with pytest.raises(UserError):
            IndexedTokens.open(tmp_path / "y")


def damage(prefix: Path, rng: random.Random) -> str:
    """Change one of the three files at random; returns what was done."""
    path = Path(f"{prefix}{rng.choice(SUFFIXES)}")
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "cut", "grow", "zero", "swap", "other"))
    if kind == "other":  # the file of another prefix
        content = bytearray(Path(f"{prefix.with_name('other')}{path.suffix}").read_bytes())
    elif kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "grow":
        content += rng.randbytes(rng.randrange(1, 9))
    elif kind == "zero":
        at = rng.randrange(len(content))
        content[at : at + 8] = bytes(len(content[at : at + 8]))
    else:
        at = rng.randrange(len(content) - 1)
        content[at], content[at + 1] = content[at + 1], content[at]
    path.write_bytes(content)
    return f"{kind} {path.suffix}"


def test_a_thousand_random_corruptions_are_refused(tmp_path: Path):
    rng = random.Random(5)
    lengths = [rng.randrange(1, 40) for _ in range(20)]
    # The other prefix has the same lengths: only the content of its `.bin` and its manifest differ.
    good, _ = (
        write(tmp_path / name, [[rng.randrange(1, 1000) for _ in range(n)] for n in lengths], tokenizer="abc").prefix
        for name in ("good", "other")
    )
    original = {suffix: Path(f"{good}{suffix}").read_bytes() for suffix in SUFFIXES}
    refused = 0
    while refused < 1000:
        prefix = tmp_path / "bad"
        for suffix, content in original.items():
            Path(f"{prefix}{suffix}").write_bytes(content)
        what = damage(prefix, rng)
        if all(Path(f"{prefix}{suffix}").read_bytes() == content for suffix, content in original.items()):
            continue  # zeros over zeros, the index of equal lengths
        if what.endswith(".json"):
            try:
                same = json.loads(manifest_path(prefix).read_bytes()) == json.loads(original[".json"])
            except ValueError:
                same = False
            if same:  # white space between the values is no damage
                continue
        with pytest.raises(UserError) as error:
            verify(prefix)
            pytest.fail(f"{what} was accepted")
        assert "bad." in str(error.value) and "\n" not in str(error.value)
        refused += 1


def replace(data: bytes, at: int, code: str, value: int) -> bytes:
    return data[:at] + struct.pack(code, value) + data[at + struct.calcsize(code) :]


BIN, IDX = layout([[1, 2, 3], [4, 5]], [0, 1, 2], "uint16")


@pytest.mark.parametrize(
    ("data", "index", "words"),
    [
        (BIN, b"NOTMEGA\x00\x00" + IDX[9:], ["x.idx", "magic"]),
        (BIN, replace(IDX, 9, "<Q", 2), ["x.idx", "version 2"]),
        (BIN, replace(IDX, 17, "<B", 9), ["x.idx", "dtype code 9"]),
        (BIN, replace(IDX, 17, "<B", 7), ["x.idx", "dtype code 7", "float32"]),
        (BIN, replace(IDX, 17, "<B", 4), ["x.idx", "byte pointer 6 for sequence 1"]),
        (BIN, replace(IDX, 18, "<Q", 3), ["x.idx", "announces"]),
        (BIN, replace(IDX, 18, "<Q", 2**63), ["x.idx", "announces"]),
        (BIN, replace(IDX, 26, "<Q", 2), ["x.idx", "announces"]),
        (BIN, IDX[:20], ["x.idx", "header"]),
        (BIN, IDX[:-1], ["x.idx", "bytes"]),
        (BIN, replace(IDX, 34, "<i", -3), ["x.idx", "negative length -3"]),
        (BIN, replace(IDX, 34, "<i", 4), ["x.idx", "byte pointer 6 for sequence 1"]),
        (BIN, replace(IDX, 38, "<i", 3), ["x.bin", "10 bytes", "12"]),
        (BIN, replace(IDX, 42, "<q", 2), ["x.idx", "byte pointer 2 for sequence 0"]),
        (BIN, replace(IDX, 58, "<q", 1), ["x.idx", "document indices"]),
        (BIN, replace(IDX, 66, "<q", -(2**63)), ["x.idx", "document indices"]),
        (BIN, replace(IDX, 66, "<q", 5), ["x.idx", "document indices"]),
        (BIN[:-1], IDX, ["x.bin", "cut off"]),
        (b"", IDX, ["x.bin", "empty"]),
        (BIN, b"", ["x.idx", "empty"]),
        (None, IDX, ["x.bin does not exist", "x.idx does"]),
        (BIN, None, ["x.idx does not exist", "x.bin does"]),
        (None, None, ["x.bin does not exist"]),
    ],
)
def test_damage_is_named(tmp_path: Path, data: bytes | None, index: bytes | None, words: list[str]):
    for path, content in ((tmp_path / "x.bin", data), (tmp_path / "x.idx", index)):
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(UserError) as error:
        IndexedTokens.open(tmp_path / "x")
    assert all(word in str(error.value) for word in words), error.value


def test_manifest_must_belong_to_the_files(tmp_path: Path):
    write(tmp_path / "a", [[1, 2, 3]])
    write(tmp_path / "b", [[1, 2, 3, 4]])
    manifest_path(tmp_path / "a").replace(manifest_path(tmp_path / "b"))
    with pytest.raises(UserError, match="tokens 3, the files hold 4"):
        IndexedTokens.open(tmp_path / "b")
    with pytest.raises(UserError, match="does not exist: nothing to verify"):
        verify(tmp_path / "a")


def test_identity_is_of_the_content_not_the_place(tmp_path: Path):
    a = write(tmp_path / "a", [[1, 2, 3]], tokenizer="one")
    b = write(tmp_path / "deep" / "b", [[1, 2, 3]], tokenizer="two")
    c = write(tmp_path / "c", [[1, 2, 4]])
    assert a.identity == b.identity != c.identity


def test_vocabulary(tmp_path: Path):
    data = write(tmp_path / "x", [[0, 5], [7]])
    for opened in (data, IndexedTokens.open(data.prefix)):
        opened.check_vocabulary(8)
        with pytest.raises(UserError, match="token 7, the vocabulary has 7"):
            opened.check_vocabulary(7)
        manifest_path(data.prefix).unlink(missing_ok=True)
    with pytest.raises(UserError, match="token -1"):
        write(tmp_path / "y", [[-1, 5]], "int16").check_vocabulary(100)
    assert [smallest_dtype(size).name for size in (256, 65_499, 65_500)] == ["uint16", "uint16", "int32"]


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 65_536), ("uint16", -1), ("int8", 128), ("int32", 2**31)])
def test_tokens_that_do_not_fit(tmp_path: Path, dtype: str, token: int):
    with pytest.raises(UserError, match=f"token {token} does not fit {dtype}"):
        write(tmp_path / "x", [[1], [token]], dtype)
    assert entries(tmp_path) == []


def test_floats_are_no_tokens(tmp_path: Path):
    with pytest.raises(UserError, match="float32; choose one of"):
        IndexedWriter(tmp_path / "x", "float32")


def test_nothing_to_write(tmp_path: Path):
    with pytest.raises(UserError, match="no tokens"), IndexedWriter(tmp_path / "x", "uint16"):
        pass
    assert entries(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["write", "body", "seal", "rename"])
def test_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], stage: str
):
    write(tmp_path / "x", [[1, 2]])
    before = stand(tmp_path)

    def fail(name: str) -> None:
        if name == stage:
            raise error

    monkeypatch.setattr(artifacts, "step_hook", fail)
    with pytest.raises(error), IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add(np.array([3, 4]))
        fail("body")
    assert stand(tmp_path) == before


def stand(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def two_sets(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """The files of the old documents and of the new ones. Both sets have the same sizes: a mix would look sound."""
    sets = {}
    for name, tokens, lengths in (("old", [1, 2, 3], [2, 1]), ("new", [4, 5, 6], [1, 2])):
        with IndexedWriter(tmp_path / name / "x", "uint16") as writer:
            writer.add(np.array(tokens), np.array(lengths))
        sets[name] = stand(tmp_path / name)
    return sets


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("has_old", [True, False])
def test_a_failure_between_the_renames_leaves_the_old_files_or_the_new_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    two_sets: dict[str, dict[str, bytes]],
    has_old: bool,
    error: BaseException,
) -> None:
    old = two_sets["old"] if has_old else {}
    last = 6 if has_old else 3
    for at in range(last):
        folder = tmp_path / str(at)
        folder.mkdir()
        for name, content in old.items():
            (folder / name).write_bytes(content)
        countdown = iter([*[None] * at, error])

        def fail(stage: str, countdown: Iterator[BaseException | None] = countdown) -> None:
            if stage == "between" and (failure := next(countdown, None)) is not None:
                raise failure

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)):
            patch.setattr(artifacts, "step_hook", fail)
            with IndexedWriter(folder / "x", "uint16") as writer:
                writer.add(np.array([4, 5, 6]), np.array([1, 2]))
        assert stand(folder) == (two_sets["new"] if at == last - 1 else old)


def test_a_kill_between_the_renames_is_never_a_mix_and_the_next_writer_brings_the_old_files_back(
    tmp_path: Path, two_sets: dict[str, dict[str, bytes]]
) -> None:
    for at in range(6):
        folder = tmp_path / str(at)
        folder.mkdir()
        for name, content in two_sets["old"].items():
            (folder / name).write_bytes(content)
        code = (
            "import os, signal, sys, numpy as np\n"
            "from trainkit import artifacts; from trainkit.data.megatron_writer import IndexedWriter\n"
            "left = [int(sys.argv[2])]\n"
            "def hook(stage):\n"
            "    if stage == 'between':\n"
            "        left[0] -= 1\n"
            "        if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "artifacts.step_hook = hook\n"
            "with IndexedWriter(sys.argv[1], 'uint16') as writer: writer.add(np.array([4, 5, 6]), np.array([1, 2]))"
        )
        child = subprocess.run([sys.executable, "-c", code, str(folder / "x"), str(at)], timeout=300, check=False)
        assert child.returncode == -signal.SIGKILL
        if at < 5:
            with pytest.raises(UserError, match=r"does not exist"):
                IndexedTokens.open(folder / "x")
        else:
            verify(folder / "x")
        with pytest.raises(RuntimeError), IndexedWriter(folder / "x", "uint16"):
            raise RuntimeError
        assert stand(folder) == two_sets["new" if at == 5 else "old"]


def test_leftovers_of_a_killed_writer_are_removed_and_a_live_one_is_respected(tmp_path: Path):
    code = (
        "import sys, time; from trainkit.data.megatron_writer import IndexedWriter\n"
        "with IndexedWriter(sys.argv[1], 'uint16'): print('open', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        assert len(entries(tmp_path)) == 3
        with pytest.raises(UserError, match="another process is writing"):
            write(tmp_path / "x", [[1]])
        write(tmp_path / "x.bin", [[1]])  # a neighbour whose name begins alike
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    write(tmp_path / "x", [[1]])
    assert entries(tmp_path) == ["x.bin", "x.bin.bin", "x.bin.idx", "x.bin.json", "x.idx", "x.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directory(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "x", [[1]])


def test_a_file_where_the_directory_should_be(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create"):
        write(tmp_path / "file" / "x", [[1]])
