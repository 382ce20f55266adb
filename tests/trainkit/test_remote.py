"""The second home of checkpoints: complete or absent there too, behind when it must, never in the way.

Against a server that speaks S3 as well, where moto and s3fs are installed: `uv pip install --target DIR moto[server]
s3fs`, then `PYTHONPATH=DIR pytest tests/trainkit/test_remote.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from trainkit import remote as remote_module
from trainkit.beginnings import choose_beginning
from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import CheckpointStore, Snapshot, list_checkpoints, load_snapshot, save_checkpoint
from trainkit.errors import UserError
from trainkit.remote import Remote, fetch_newest, mirror, open_remote
from trainkit.specs import CheckpointSpec


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[str]:
    match request.param:
        case "file":
            yield f"file://{tmp_path}/far/run"
        case "memory":
            yield "memory://far/run"
            fsspec.filesystem("memory").store.clear()
        case _:
            yield from s3_url(request.getfixturevalue("monkeypatch"))


def s3_url(monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """A new bucket of a server of its own on this machine."""
    moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # buckets outlive their server
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/far/run"
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "LAST_PAUSES", (0.01, 0.01))
    monkeypatch.setattr(remote_module, "RETRY_SECONDS", 0.01)


def write_assets(directory: Path) -> None:
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_text("{}")


def store(root: Path, url: str, messages: list[str] | None = None, **spec: Any) -> CheckpointStore:
    report = (messages if messages is not None else []).append
    return CheckpointStore(root, CheckpointSpec(remote=url, **spec), write_assets=write_assets, report=report)


def state(step: int, best: int | None = None) -> Snapshot:
    trainer = {"step": step, "best": {"step": best} if best else {}}
    return Snapshot(trainer, {"weight": torch.full((4,), float(step))})


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_kept_here_is_kept_there_and_comes_back_to_the_bit(tmp_path: Path, url: str) -> None:
    with CheckpointWriter(store(tmp_path / "near", url, keep_last=2)) as writer:
        for step in range(1, 7):
            writer.save(state(step, best=2 if step >= 2 else None))
    assert writer.messages() == []
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "near")] == ["2", "5", "6"]
    assert open_remote(url).steps() == [2, 5, 6]
    wanted = content(tmp_path / "near" / "step-00000006")

    shutil.rmtree(tmp_path / "near")
    messages: list[str] = []
    beginning = choose_beginning(store(tmp_path / "near", url, messages))
    assert beginning.kind == "own" and beginning.path.name == "step-00000006"
    assert content(beginning.path) == wanted and messages == [f"fetched step-00000006 from {url}"]


def overwrite(remote: Remote, name: str, change: Any) -> None:
    path = f"{remote.folder}/{name}"
    remote.files.pipe_file(path, change(remote.files.cat_file(path)))


def test_damage_there_is_named_and_passed_over(tmp_path: Path, url: str) -> None:
    place, remote = store(tmp_path / "near", url, keep_last=9), open_remote(url)
    for step in (1, 2, 3, 4):
        save_checkpoint(place, state(step))
    assert mirror(remote, place.root, place.spec) == [4, 3, 2, 1]
    overwrite(remote, "step-00000004/model.safetensors", lambda data: data[:-1] + b"x")
    overwrite(remote, "step-00000003/manifest.json", lambda data: data.replace(b'"step": 3', b'"step": 7'))
    remote.files.rm_file(f"{remote.folder}/step-00000002/manifest.json")
    path, problems = fetch_newest(remote, tmp_path / "other")
    assert path is not None and load_snapshot(path).trainer["step"] == 1
    assert len(problems) == 2 and "model.safetensors" in problems[0] and "step-00000003" in problems[1]
    shutil.rmtree(place.root)
    assert choose_beginning(place).path.name == "step-00000001"
    assert [entry.name for entry in place.root.iterdir()] == ["step-00000001"]


def test_damage_there_is_made_good_when_the_run_comes_to_its_step_again(tmp_path: Path, url: str) -> None:
    place, remote = store(tmp_path / "near", url, keep_last=9), open_remote(url)
    for step in (1, 4):
        save_checkpoint(place, state(step))
    mirror(remote, place.root, place.spec)
    overwrite(remote, "step-00000004/model.safetensors", lambda data: data[:-1] + b"x")
    shutil.rmtree(place.root)
    assert choose_beginning(place).path.name == "step-00000001"
    with CheckpointWriter(place) as writer:
        writer.save(state(4))
    path, problems = fetch_newest(remote, tmp_path / "other")
    assert path is not None and path.name == "step-00000004" and not problems


def test_a_damaged_checkpoint_here_gives_way_to_the_intact_one_there(tmp_path: Path, url: str) -> None:
    place, remote = store(tmp_path / "near", url), open_remote(url)
    path = save_checkpoint(place, state(1))
    mirror(remote, place.root, place.spec)
    wanted = content(path)
    (path / "model.safetensors").write_bytes(b"damage")
    assert choose_beginning(place).path == path and content(path) == wanted


@pytest.mark.parametrize("after", range(4))
def test_an_upload_that_breaks_off_is_nothing_and_the_next_round_makes_up_for_it(
    tmp_path: Path, url: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, remote = store(tmp_path / "near", url, keep_last=9), open_remote(url)
    save_checkpoint(place, state(1))
    mirror(remote, place.root, place.spec)
    save_checkpoint(place, state(2))
    left, put = [after], remote.files.put_file

    def breaks(*arguments: Any, **more: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("connection reset")
        put(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(remote.files, "put_file", breaks)
        if after < 3:
            with pytest.raises(OSError, match="connection reset"):
                mirror(remote, place.root, place.spec)
            assert remote.steps() == [1]
    mirror(remote, place.root, place.spec)
    assert remote.steps() == [1, 2]
    shutil.rmtree(place.root)
    assert choose_beginning(place).path.name == "step-00000002"


@pytest.mark.parametrize("nth", range(5))
def test_a_kill_in_the_middle_of_an_upload_leaves_the_checkpoint_before_it(tmp_path: Path, nth: int) -> None:
    """Three files and the manifest; each arrives by halves before the kill, but for the last time, which has none."""
    url = f"file://{tmp_path}/far"
    place, remote = store(tmp_path / "near", url, keep_last=9), open_remote(url)
    save_checkpoint(place, state(1))
    mirror(remote, place.root, place.spec)
    save_checkpoint(place, state(2))
    child = os.fork()
    if child == 0:
        arrived: list[str] = []

        def arrive(target: str, content: bytes) -> None:
            is_cut = len(arrived) == nth
            arrived.append(target)
            Path(target).write_bytes(content[: len(content) // 2] if is_cut else content)
            if is_cut:
                os.kill(os.getpid(), signal.SIGKILL)

        remote.files.put_file = lambda local, target: arrive(target, Path(local).read_bytes())
        remote.files.pipe_file = arrive
        mirror(remote, place.root, place.spec)
        os._exit(len(arrived) != 4 or not arrived[-1].endswith("manifest.json"))
    _, status = os.waitpid(child, 0)
    assert status == (signal.SIGKILL if nth < 4 else 0)
    path, problems = fetch_newest(open_remote(url), tmp_path / "other")
    assert path is not None and path.name == f"step-0000000{2 if nth == 4 else 1}"
    assert len(problems) == (nth == 3)  # half a manifest is the only thing that looks like a checkpoint
    assert mirror(open_remote(url), place.root, place.spec) == ([] if nth == 4 else [2])
    path, problems = fetch_newest(open_remote(url), tmp_path / "another")
    assert path is not None and path.name == "step-00000002" and not problems


def test_what_retention_deletes_in_the_middle_of_its_upload_is_left_out(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, remote = store(tmp_path / "near", url, keep_last=1), open_remote(url)
    save_checkpoint(place, state(1))
    put, newer = remote.files.put_file, iter([2])

    def save_meanwhile(*arguments: Any) -> None:
        for step in newer:
            save_checkpoint(place, state(step))
        put(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(remote.files, "put_file", save_meanwhile)
        assert mirror(remote, place.root, place.spec) == []
    assert remote.steps() == []
    assert mirror(remote, place.root, place.spec) == [2] == remote.steps()


def test_a_network_that_is_down_never_stops_the_run(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(self: Remote) -> list[int]:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "steps", down)
        with CheckpointWriter(store(tmp_path / "near", url, keep_last=9)) as writer:
            writer.save(state(1))
            writer.save(state(2))
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "near")] == ["1", "2"]
    assert all("no route to host" in text for text in writer.messages()) and writer.newest is not None
    with CheckpointWriter(store(tmp_path / "near", url, keep_last=9)) as writer:
        writer.save(state(3))
    assert open_remote(url).steps() == [1, 2, 3]


def test_a_url_that_nothing_opens_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r'checkpoint\.remote = "nowhere://x" cannot be opened'):
        open_remote("nowhere://x")


def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path: Path, url: str) -> None:
    place, remote = store(tmp_path / "near", url), open_remote(url)
    save_checkpoint(place, state(1))
    mirror(remote, place.root, place.spec)

    def lead_astray(data: bytes) -> bytes:
        manifest = json.loads(data)
        manifest.pop("checksum")
        return json.dumps({**manifest, "format": 1, "files": {"../evil": {"bytes": 1, "sha256": ""}}}).encode()

    overwrite(remote, "step-00000001/manifest.json", lead_astray)
    path, problems = fetch_newest(remote, tmp_path / "other" / "deep")
    assert path is None and "names ../evil" in problems[0]
