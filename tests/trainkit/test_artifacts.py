"""File sets are whole or absent: whatever stage fails, and whatever bit flips afterwards."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainkit import artifacts
from trainkit.artifacts import publish_directory, publish_file, publishing, remove_leftovers, verify_directory
from trainkit.errors import UserError


def fill(directory: Path, text: str = "hello") -> None:
    (directory / "sub").mkdir()
    (directory / "a.txt").write_text(text)
    (directory / "sub" / "b.bin").write_bytes(bytes(range(256)))


def test_a_published_directory_verifies(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "x" / "set", extra={"step": 3}) as temporary:
        fill(temporary)
        assert not (tmp_path / "x" / "set").exists()
    manifest = verify_directory(tmp_path / "x" / "set")
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"a.txt", "sub/b.bin"}
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["set"]


def test_a_set_inside_a_set_is_covered_with_its_manifest(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "outer") as outer, publish_directory(outer / "inner") as inner:
        fill(inner)
    assert "inner/manifest.json" in verify_directory(tmp_path / "outer")["files"]


def test_replacing_keeps_the_old_set_until_the_new_one_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "set"
    with publish_directory(place) as temporary:
        fill(temporary, "old")
    with pytest.raises(UserError, match="exists already"), publish_directory(place):
        pass
    with pytest.raises(RuntimeError), publish_directory(place, replace=True) as temporary:
        fill(temporary, "half")
        raise RuntimeError
    assert (place / "a.txt").read_text() == "old"
    with publish_directory(place, replace=True) as temporary:
        fill(temporary, "new")
        assert (place / "a.txt").read_text() == "old"
    assert (place / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("stage", ["write", "seal", "rename"])
def test_a_failure_at_any_stage_leaves_nothing(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(at: str) -> None:
        if at == stage:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "step_hook", fail)
    words = r"cannot write .*set: No space left on device; free some space"
    with pytest.raises(UserError, match=words), publish_directory(tmp_path / "set") as temporary:
        fill(temporary)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: the system refuses as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_system_refuses_is_one_sentence_and_leaves_what_was_there(tmp_path: Path) -> None:
    publish_file(tmp_path / "f", "old")
    with file_size_limit(10_000):
        with pytest.raises(UserError, match=r"cannot write .*/f: File too large"):
            publish_file(tmp_path / "f", bytes(20_000))
        words = r"cannot write .*/set: File too large"
        with pytest.raises(UserError, match=words), publish_directory(tmp_path / "set") as temporary:
            (temporary / "a").write_bytes(bytes(20_000))
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path, is_locked: bool) -> None:
    publish_file(tmp_path / "f", "old")
    with pytest.raises(KeyboardInterrupt), publishing(tmp_path / "f", is_locked=is_locked) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with publishing(tmp_path / "f", is_locked=is_locked) as file:
        file.write(b"new")
        assert (tmp_path / "f").read_text() == "old"
    assert (tmp_path / "f").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_who_writes_a_file_alone_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with publishing(tmp_path / "f", is_locked=True):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with publishing(tmp_path / "f", is_locked=True) as file:
        file.write(b"whole")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "whole")]


@pytest.mark.parametrize("stage", ["write", "seal", "rename", "renamed"])
def test_a_kill_at_any_stage_leaves_all_or_nothing(tmp_path: Path, stage: str) -> None:
    child = os.fork()
    if child == 0:
        artifacts.step_hook = lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == stage else None
        with publish_directory(tmp_path / "set") as temporary:
            fill(temporary)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "set").exists() == (stage == "renamed")
    remove_leftovers(tmp_path)
    if stage == "renamed":
        verify_directory(tmp_path / "set")
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("stage", ["write", "seal", "rename", "between", "renamed"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(tmp_path: Path, stage: str, can_exchange: bool) -> None:
    place = tmp_path / "set"
    with publish_directory(place) as temporary:
        fill(temporary, "old")
    child = os.fork()
    if child == 0:
        try:
            artifacts.step_hook = lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == stage else None
            if not can_exchange:
                artifacts._exchange = lambda first, second: False
            with publish_directory(place, replace=True) as temporary:
                fill(temporary, "new")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    never = stage == "between" and can_exchange
    assert (os.WTERMSIG(status) == signal.SIGKILL) != never
    if can_exchange:
        verify_directory(place)
    remove_leftovers(tmp_path)
    verify_directory(place)
    assert (place / "a.txt").read_text() == ("new" if stage == "renamed" or never else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_a_failure_between_the_renames_brings_the_old_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with publish_directory(tmp_path / "set") as temporary:
        fill(temporary, "old")

    def fail(stage: str) -> None:
        if stage == "between":
            raise error

    monkeypatch.setattr(artifacts, "_exchange", lambda first, second: False)
    monkeypatch.setattr(artifacts, "step_hook", fail)
    with pytest.raises((KeyboardInterrupt, UserError)), publish_directory(tmp_path / "set", replace=True) as temporary:
        fill(temporary, "new")
    verify_directory(tmp_path / "set")
    assert (tmp_path / "set" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_only_a_set_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    def publish(kind: str) -> None:
        with publish_directory(tmp_path / "set", replace=True, extra={"kind": kind}) as temporary:
            fill(temporary, kind)

    place = tmp_path / "set"
    place.mkdir()
    publish("tokenizer")  # an empty directory holds nothing to lose
    publish("tokenizer")
    with pytest.raises(UserError, match="set is not a checkpoint that this project wrote; remove it or choose another"):
        publish("checkpoint")
    for content in ("[]", "{", '{"kind": "tokenizer"}'):
        (place / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="set is not a tokenizer that this project wrote"):
            publish("tokenizer")
    assert (place / "a.txt").read_text() == "tokenizer"
    shutil.rmtree(place)
    place.write_text("a file")
    with pytest.raises(UserError, match="set is not a tokenizer"):
        publish("tokenizer")
    assert place.read_text() == "a file"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "a.txt").write_text("hellp"),
        lambda d: (d / "a.txt").write_text("hell"),
        lambda d: (d / "sub" / "b.bin").unlink(),
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "manifest.json").write_text("{"),
        lambda d: (d / "manifest.json").write_text("[]"),
        lambda d: (d / "manifest.json").write_text('{"format": 99, "files": {}}'),
        lambda d: (d / "manifest.json").write_text('{"format": 1, "files": {"a.txt": 3}}'),
    ],
)
def test_damage_is_named(tmp_path: Path, damage) -> None:
    with publish_directory(tmp_path / "set") as temporary:
        fill(temporary)
    damage(tmp_path / "set")
    with pytest.raises(UserError, match="set"):
        verify_directory(tmp_path / "set")


def test_publish_file_replaces_in_one_step(tmp_path: Path) -> None:
    publish_file(tmp_path / "f", "one")
    publish_file(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"), publish_directory(tmp_path / "file" / "set"):
        pass
