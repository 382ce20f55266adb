"""`scripts/fetch_data.sh` against a server that behaves like the hub, like a plain one, and badly."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.operations.servers import Server, serve_files
from transformerlm.tokenizer.files import MERGES_HEADER
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.vocabulary import trained_vocabulary

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "fetch_data.sh"
TOKENIZER_FILES = (
    "vocab_simplestories_8k.json",
    "merges_simplestories_8k.txt",
    "special_tokens_simplestories_8k.json",
)
BINS = tuple(f"simplestories_{name}_text_document.{ending}" for name in ("train", "test") for ending in ("bin", "idx"))

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """What the server has."""
    vocabulary = trained_vocabulary([(b"s", b"t")], ["<|endoftext|>"])
    Tokenizer(vocabulary).save(tmp_path / "made")
    folder = tmp_path / "files"
    (folder / "gpt2").mkdir(parents=True)
    for kind, ending in (("vocab", "json"), ("merges", "txt"), ("special_tokens", "json")):
        shutil.copy(tmp_path / "made" / f"{kind}.{ending}", folder / f"{kind}_simplestories_8k.{ending}")
    for number, name in enumerate(BINS):
        (folder / name).write_bytes(bytes([number]) * (100_000 + number))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def server(tmp_path: Path, files: dict[str, bytes]) -> Generator[Server]:
    with serve_files(tmp_path / "files") as server:
        yield server


def fetch(server: Server, *arguments: str, check: bool = True, **variables: str) -> str:
    environment = {**os.environ, "SIMPLESTORIES_URL": server.url, "GPT2_URL": f"{server.url}/gpt2", **variables}
    done = subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode == 0) == check, done.stderr
    return done.stderr


def there(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS"}


@pytest.mark.parametrize("like_the_hub", [True, False])
def test_fetches_all_files_and_then_nothing(
    server: Server, files: dict[str, bytes], tmp_path: Path, like_the_hub: bool
) -> None:
    server.states_hashes = like_the_hub
    folder = tmp_path / "a folder"
    fetch(server, str(folder))
    assert there(folder) == files and set(files) == {*TOKENIZER_FILES, *BINS}
    assert Tokenizer.load(folder / "simplestories_8k").decode([97]) == "a"
    asked = len(server.requests)
    assert "is there" in fetch(server, str(folder), "--verify")
    assert len(server.requests) == asked


def test_the_tokenizer_alone(server: Server, tmp_path: Path) -> None:
    fetch(server, "--no-bins", str(tmp_path / "data"))
    assert set(there(tmp_path / "data")) == set(TOKENIZER_FILES)


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_where_the_connection_broke(
    server: Server, files: dict[str, bytes], tmp_path: Path, ranges: bool
) -> None:
    server.ranges = ranges
    fetch(server, "--no-bins", str(tmp_path / "data"))
    server.breaks_after = 30_000
    fetch(server, str(tmp_path / "data"), check=False)
    assert not set(there(tmp_path / "data")) & set(BINS), "a file under its name is whole"
    before = len(server.requests)
    fetch(server, str(tmp_path / "data"))
    assert there(tmp_path / "data") == files
    ranges_asked = [wanted for _, wanted in server.requests[before:] if wanted]
    assert ranges_asked and all(wanted.startswith("bytes=30000") for wanted in ranges_asked)


def test_what_arrives_damaged_is_not_kept(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    server.damages = True
    assert "damaged" in fetch(server, str(tmp_path / "data"), check=False)
    assert there(tmp_path / "data") == {}
    server.damages = False
    fetch(server, str(tmp_path / "data"))
    assert there(tmp_path / "data") == files


def test_git_hashes_are_checked_too(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    """The server states them of all files but .bin and .json."""
    folder = tmp_path / "data"
    fetch(server, str(folder))
    (folder / "merges_simplestories_8k.txt").unlink()
    server.damages = True
    message = fetch(server, str(folder), check=False)
    assert "merges_simplestories_8k.txt arrived damaged" in message and "hash" in message


def test_damage_on_the_disk_is_found(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fetch(server, str(folder))
    (folder / BINS[0]).write_bytes(b"other")
    assert BINS[0] in fetch(server, str(folder), "--verify", check=False)


def test_gpt2_must_be_gpt2(server: Server, tmp_path: Path) -> None:
    """Its vocabulary is known by its hash."""
    (tmp_path / "files" / "gpt2" / "vocab.json").write_text("{}")
    (tmp_path / "files" / "gpt2" / "merges.txt").write_text(MERGES_HEADER)
    assert "damaged" in fetch(server, str(tmp_path / "data"), "--no-bins", "--gpt2", check=False)


def test_fetches_gpt2(server: Server, tmp_path: Path) -> None:
    real = ROOT.parent / "shared" / "data" / "gpt2"
    if not real.is_dir():
        pytest.skip("GPT-2's files are not in ../shared/data/gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(real / name, tmp_path / "files" / "gpt2" / name)
    fetch(server, str(tmp_path / "data"), "--no-bins", "--gpt2")
    assert Tokenizer.load(tmp_path / "data" / "gpt2").encode("Hello world").tolist() == [15496, 995]


def test_the_token_goes_to_the_server_and_nowhere_else(server: Server, tmp_path: Path) -> None:
    secret = "hf_" + "s3cret" * 5
    said = fetch(server, str(tmp_path / "data"), HF_TOKEN=secret)
    assert server.tokens == {f"Bearer {secret}"} and secret not in said


def test_usage(server: Server, tmp_path: Path) -> None:
    assert "name the directory" in fetch(server, check=False)
    assert "--gtp2" in fetch(server, "--gtp2", "x", check=False)
    fetch(server, "--help")
    assert "cannot be downloaded" in fetch(server, str(tmp_path), SIMPLESTORIES_URL=f"{server.url}/no", check=False)
