"""The sharder as a command: real processes, killed at every point."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import shard_dataset
from tests.trainkit.fake_hub import Dataset, running
from tests.trainkit.hub_cases import SHA, jsonl, zipped
from trainkit.artifacts import read_manifest, verify_directory
from trainkit.data.documents import open_local_documents
from trainkit.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "shard_dataset.py")]
TEXTS = [f"document {i}\n\nwith {'many ' * (i % 30)}words\r\n" if i % 50 else "\r\n\n" for i in range(5000)]
LINES = [f"document {i} with {'many ' * (i % 30)}words" if i % 50 else "" for i in range(5000)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files: 2,000 rows, none, 3,000 rows."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS[:2000]))
    (folder / "b.jsonl").write_bytes(b"")
    (folder / "c.jsonl.gz").write_bytes(zipped(jsonl(TEXTS[2000:])))
    return folder


def run(source: Path | str, root: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*SCRIPT, "--dataset", str(source), "--experiment", "exp", "--root", str(root), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def documents(folder: Path) -> list[str]:
    return [text for shard in open_local_documents(folder).shards for text in shard.read(0)]


def test_every_document_is_on_one_line_of_one_split(source: Path, tmp_path: Path) -> None:
    for options in (("--max-lines", "700"), ("--gzip", "--max-lines", "10000"), ("--format", "jsonl", "--gzip")):
        root = tmp_path / "-".join(options)
        done = run(source, root, "--val-fraction", "0.2", *options)
        assert done.returncode == 0, done.stderr
        train, val = documents(root / "train" / "exp"), documents(root / "val" / "exp")
        wanted = TEXTS if "jsonl" in options else [line for line in LINES if line]
        order = {text: index for index, text in enumerate(wanted)}
        if "jsonl" not in options:  # there are equal texts (the empty ones) otherwise
            assert sorted(train + val, key=order.__getitem__) == wanted
            assert [order[text] for text in train] == sorted(order[text] for text in train)
        assert sorted(train + val) == sorted(wanted)
        assert 0.17 < len(val) / len(wanted) < 0.23
        for split, texts in (("train", train), ("val", val)):
            manifest = verify_directory(root / split / "exp")
            assert manifest["documents"] == len(texts) and manifest["rows"] == 5000
            assert manifest["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
            assert manifest["rows_without_text"] == (0 if "jsonl" in options else 100)
            suffix = (".jsonl" if "jsonl" in options else ".lines") + (".gz" if "--gzip" in options else "")
            assert list(manifest["files"]) == [f"shard-{i:05d}{suffix}" for i in range(len(manifest["files"]))]
            for file in (root / split / "exp").glob("shard*"):
                data = file.read_bytes()
                lines = (gzip.decompress(data) if "--gzip" in options else data).count(b"\n")
                assert 0 < lines <= (700 if "700" in options else 10000)
        assert not list(root.glob(".*")), "nothing unfinished is left"


def test_workers_change_nothing_and_a_second_call_does_nothing(source: Path, tmp_path: Path) -> None:
    for workers in ("1", "3"):
        assert run(source, tmp_path / workers, "--gzip", "--workers", workers).returncode == 0
    assert content(tmp_path / "1") == content(tmp_path / "3")
    before = content(tmp_path / "1")
    again = run(source, tmp_path / "1", "--gzip")
    assert again.returncode == 0 and "finished already" in again.stderr
    assert content(tmp_path / "1") == before
    for option, value in (("--seed", "5"), ("--val-fraction", "0"), ("--max-lines", "7")):
        refused = run(source, tmp_path / "1", "--gzip", option, value)
        assert refused.returncode == 1 and option in refused.stderr and refused.stderr.count("\n") == 1
    assert content(tmp_path / "1") == before


@pytest.mark.parametrize("limit", [1, 1999, 2000, 2001, 4999, 9000])
def test_the_first_rows_and_a_split_that_stays(source: Path, tmp_path: Path, limit: int) -> None:
    def shard(root: Path, max_rows: int) -> list[list[str]]:
        options = ["--max-rows", str(max_rows), "--val-fraction", "0.3", "--format", "jsonl"]
        arguments = ["--dataset", str(source), "--experiment", "exp", "--root", str(root), *options]
        settings = shard_dataset.parse_arguments(arguments)
        known = {name: getattr(settings, name) for name in shard_dataset.Settings.__dataclass_fields__}
        shard_dataset.shard(shard_dataset.Settings(**known), root, "exp", workers=2, say=lambda line: None)
        found = [root / split / "exp" for split in ("train", "val")]
        return [documents(folder) if len(list(folder.iterdir())) > 1 else [] for folder in found]

    some, everything = shard(tmp_path / "some", limit), shard(tmp_path / "all", 0)
    assert sorted(some[0] + some[1]) == sorted(TEXTS[:limit])
    for few, many in zip(some, everything, strict=True):
        assert few == many[: len(few)]


def fragile_script(tmp_path: Path) -> list[str]:
    """The command with a note after every 100 rows, which takes the number of the disk operation that kills it (0 =
    none) and the length of a pause before each."""
    path = tmp_path / "fragile.py"
    path.write_text(f"""
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from scripts import shard_dataset as sharder
from trainkit.data import text_shards
text_shards.ROWS_BETWEEN_NOTES = 100
last, pause = int(sys.argv.pop(1)), float(sys.argv.pop(1))
lock, count = threading.Lock(), 0
def fragile(function):
    def wrapper(*arguments, **options):
        global count
        time.sleep(pause)
        with lock:
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapper
for owner, names in (
    (text_shards.Work, ("note", "append")), (sharder, ("publish_file",)),
    (text_shards, ("seal_directory", "fsync_directory", "publish_file")),
    (os, ("fsync",)), (Path, ("rename", "replace", "unlink", "mkdir")), (sharder.shutil, ("rmtree",)),
):
    for name in names:
        setattr(owner, name, fragile(getattr(owner, name)))
sharder.main()
""")
    return [sys.executable, str(path)]


def test_kills_leave_no_trace(source: Path, tmp_path: Path) -> None:
    kill_until_finished(source, tmp_path, ["--gzip", "--max-lines", "333"], random.Random(1), most=100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_kills_leave_no_trace(source: Path, tmp_path: Path, seed: int) -> None:
    options = [["--gzip"], ["--max-lines", "400"], ["--max-rows", "2500", "--gzip"], ["--max-rows", "1500"]][seed % 4]
    kill_until_finished(source, tmp_path, [*options, "--workers", "3"], random.Random(seed), most=60)


def kill_until_finished(source: Path, tmp_path: Path, options: list[str], moments: random.Random, *, most: int) -> None:
    """Runs that are killed after 1 to `most` operations of the disk, until one comes to the end."""
    arguments = ["--dataset", str(source), "--experiment", "exp", "--val-fraction", "0.2", *options, "--root"]
    script = fragile_script(tmp_path)
    whole = subprocess.run([*script, "0", "0", *arguments, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    kills = 0
    while True:
        last = str(moments.randint(1, most))
        done = subprocess.run(
            [*script, last, "0", *arguments, str(tmp_path / "killed")], capture_output=True, text=True
        )
        if done.returncode != -signal.SIGKILL:
            break
        kills += 1
        assert kills < 200
    assert done.returncode == 0, done.stderr
    assert kills >= 3
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    for split in ("train", "val"):
        verify_directory(tmp_path / "killed" / split / "exp")


def test_ctrl_c_can_be_continued(source: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(source), "--experiment", "exp", "--root", str(tmp_path / "out")]
    process = subprocess.Popen([*fragile_script(tmp_path), "0", "0.1", *arguments], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".exp.unfinished" / "00000" / "progress.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    busy = subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert busy.returncode == 1 and "another process" in busy.stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and errors.endswith("the same command goes on from here\n")
    done = run(source, tmp_path / "out")
    assert done.returncode == 0 and "going on" in done.stderr
    assert len(documents(tmp_path / "out" / "train" / "exp")) > 4000


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--experiment", "a/b"], "--experiment"),
        (["--experiment", ".."], "--experiment"),
        (["--val-fraction", "1"], "--val-fraction"),
        (["--val-fraction", "nan"], "--val-fraction"),
        (["--max-lines", "0"], "--max-lines"),
        (["--max-rows", "-1"], "--max-rows"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_bad_arguments(options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        shard_dataset.parse_arguments(["--dataset", "d", "--experiment", "e", "--root", "r", *options])
    assert exit.value.code == 2 and word in capsys.readouterr().err


def settings(dataset: Path, **changes: Any) -> shard_dataset.Settings:
    known = {"config": "", "revision": "", "split": "train", "text_field": "text", "format": "lines", "gzip": False}
    known |= {"val_fraction": 0.1, "seed": 0, "max_rows": 0, "max_lines": 100}
    return shard_dataset.Settings(**{**known, "dataset": str(dataset), **changes})


def test_bad_sources_are_one_sentence(source: Path, tmp_path: Path) -> None:
    def refused(dataset: Path, *words: str, **changes: Any) -> None:
        with pytest.raises(shard_dataset.UserError) as error:
            shard_dataset.shard(settings(dataset, **changes), tmp_path / "o", "exp", workers=2, say=lambda line: None)
        assert all(word in str(error.value) for word in words), str(error.value)

    refused(tmp_path / "nowhere", "nowhere")
    refused(Path("data/nowhere.jsonl"), "does not exist")
    refused(source, "body", text_field="body")
    (source / "a.jsonl").write_bytes(jsonl(TEXTS[:5]) + b'{"text": 6}\n')
    refused(source, "a.jsonl", "line 6")
    refused(source, "was made with --text-field text, not with --text-field body", text_field="body")
    refused(source, "was made without --gzip, not with --gzip;", gzip=True)
    (source / "a.jsonl").write_bytes(jsonl(["changed"]))
    refused(source, "has changed")
    (tmp_path / "o" / "train" / "exp").mkdir(parents=True)
    refused(source, "not a folder of shards")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.jsonl").write_bytes(b"")
    with pytest.raises(shard_dataset.UserError, match="holds no document"):
        shard_dataset.shard(settings(empty), tmp_path / "p", "exp", workers=1, say=lambda line: None)


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_shards_that_were_not_copied_completely_are_refused(source: Path, tmp_path: Path, damage: str) -> None:
    whole = settings(source, gzip=True, val_fraction=0.0)
    shard_dataset.shard(whole, tmp_path / "o", "exp", workers=1, say=lambda line: None)
    last = sorted((tmp_path / "o" / "train" / "exp").glob("*.gz"))[-1]
    assert open_local_documents(last.parent).shards
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-1])
    for folder in (last.parent, last.parent.parent):
        with pytest.raises(UserError, match=rf"{last.name} has \w+ bytes where manifest.json says"):
            open_local_documents(folder)


def test_a_hub_data_set_stays_at_its_commit(tmp_path: Path) -> None:
    with running() as hub:
        hub.datasets["org/set"] = Dataset({"a.jsonl.gz": zipped(jsonl(TEXTS))}, SHA)
        done = run("org/set", tmp_path / "out", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out" / "train" / "exp")
    assert manifest["commit"] == SHA and json.loads(manifest["source"])["revision"] == SHA
    assert (tmp_path / "home").exists()
    assert len(documents(tmp_path / "out" / "train" / "exp")) + len(documents(tmp_path / "out" / "val" / "exp")) == 4900
