"""The pipeline by profile: from a text file to a run that goes on, and every command of docs/cloud.md."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from cli import infer, layout, pipeline, train
from trainkit.artifacts import MANIFEST
from trainkit.interrupts import Interrupts
from transformerlm.corpus.stories import sample

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "cloud.md").read_text(encoding="utf-8")
STORIES = [sample(7, number) for number in range(150)]
TINY = [
    "tokenizer.vocab_size=300",
    "model.context_length=64",
    "model.num_layers=1",
    "model.d_model=32",
    "model.num_heads=2",
    "training.total_batch_size=512",
    "training.device_batch_size=8",
    "training.max_steps=4",
    "training.log_every=1",
    "training.save_every=2",
    "training.precision=fp32",
    "training.threads=1",
    "schedule.warmup_steps=1",
    "inference.total_length=24",
    "logging.plots=false",
]
SMOKE = ["--profile", "local", "--input", "data/input.txt", *TINY]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one plain-text file, without any line between its stories."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(layout.ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text("\n\n".join(STORIES))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a pipeline says while it does what it should."""

    def run(*arguments: str, code: int = 0) -> str:
        capfd.readouterr()
        found = pipeline.main(list(arguments))
        error = capfd.readouterr().err
        assert found == code and "Traceback" not in error, error
        return error

    return run


def step_of(run: str) -> int:
    return json.loads((Path(run) / "status.json").read_text())["step"]


def ids(tokenizer: str) -> int:
    return json.loads((Path(tokenizer) / MANIFEST).read_text())["vocab_size"]


def test_the_same_command_goes_on_and_train_runs_what_it_wrote(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*SMOKE, "--run-dir", "runs/smoke"]
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "requested", property(lambda self: next(calls) >= 2))
        said(*command, code=75)
    assert step_of("runs/smoke") == 3
    text = said(*command)
    assert "tokenizer/smoke, as it is" in text and text.count("up to date") == 2 and step_of("runs/smoke") == 4
    assert "is finished" in said(*command)
    assert json.loads(Path("runs/smoke/summary.json").read_text())["val_documents"] > 0
    written = ["--config", "artifacts/smoke/train.toml"]
    assert train.main([*written, "--resume"]) == 0
    assert train.main([*written, "--name", "slower", "--override", "optimizer.learning_rate=4e-5"]) == 0
    assert json.loads(Path("runs/slower/config.json").read_text())["optimizer"]["learning_rate"] == 4e-5


@pytest.mark.slow
def test_killed_anywhere_the_same_command_ends_with_the_same_weights(place: Path) -> None:
    """SIGKILL from the first second on, in whichever stage; nothing else is done between two attempts."""
    settings = [*SMOKE, "training.max_steps=150", "training.save_every=5", "--run-dir", "runs/smoke"]
    command = [sys.executable, "-m", "cli.pipeline", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert pipeline.main([*settings, "--root", "whole"]) == 0
    seconds, codes = 1.0, list[int]()
    while not codes or codes[-1] == -signal.SIGKILL:
        process = subprocess.Popen([*command, "--root", "killed"], env=environment, stdout=subprocess.DEVNULL)
        try:
            codes.append(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
        seconds *= 1.3
    assert codes[-1] == 0 and len(codes) > 3, codes
    for name in ("model", "optimizer-00000"):
        files = [place / root / f"runs/smoke/checkpoints/latest/{name}.safetensors" for root in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_a_tokenizer_that_is_found_is_used(said: Callable[..., str]) -> None:
    one = [*SMOKE, "--experiment", "tales", "training.max_steps=1"]
    assert "300 ids" in said(*one, "--run-dir", "runs/a")
    assert "tokenizer/tales, as it is" in said(*one, "--run-dir", "runs/b")
    other = [*one, "--run-dir", "runs/c", "tokenizer.vocab_size=290"]
    assert "tokenizer.vocab_size was 300, is 290" in said(*other, code=2)
    assert ids("artifacts/tokenizer/tales") == 300 and not Path("runs/c").exists()
    text = said(*other, "--force-retrain-tokenizer")
    assert "runs trained with it go on only" not in text and ids("artifacts/tokenizer/tales") == 290
    # What the run was trained with is another one now, and that is said.
    assert "inputs.tokenizer" in said(*one, "--run-dir", "runs/a", "tokenizer.vocab_size=290", code=2)


def test_a_tokenizer_from_elsewhere(said: Callable[..., str]) -> None:
    said(*SMOKE, "--run-dir", "runs/a", "training.max_steps=1")
    theirs = Path("artifacts/tokenizer/a/tokenizer.json")
    shutil.copy(theirs, "theirs.json")
    arguments = [*SMOKE, "--run-dir", "runs/b", "training.max_steps=1"]
    assert "theirs.json, as it is" in said(*arguments, "--tokenizer-json", "theirs.json")
    assert not Path("artifacts/tokenizer/b").exists()
    assert train.main(["--config", "artifacts/b/train.toml", "--resume"]) == 0
    # Put where the bundle of an experiment lies, it serves too, and is never overwritten.
    bundle = Path("artifacts/tokenizer/mine")
    bundle.mkdir()
    shutil.copy(theirs, bundle)
    mine = [*SMOKE, "--run-dir", "runs/c", "--experiment", "mine", "training.max_steps=1", "tokenizer.vocab_size=999"]
    assert "tokenizer/mine, as it is" in said(*mine)
    assert "not a tokenizer that this project wrote" in said(*mine, "--force-retrain-tokenizer", code=1)
    assert [path.name for path in bundle.iterdir()] == ["tokenizer.json"]


def test_a_tokenizer_that_cannot_serve(said: Callable[..., str]) -> None:
    said(*SMOKE, "--run-dir", "runs/a", "training.max_steps=1")
    content = json.loads(Path("artifacts/tokenizer/a/tokenizer.json").read_text())
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    Path("no-end.json").write_text(json.dumps(content))
    arguments = [*SMOKE, "--run-dir", "runs/b"]
    assert "no-end.json has no <|endoftext|>" in said(*arguments, "--tokenizer-json", "no-end.json", code=1)
    assert "nowhere.json" in said(*arguments, "--tokenizer-json", "nowhere.json", code=1)
    Path("torn.json").write_text("{")
    assert "torn.json" in said(*arguments, "--tokenizer-json", "torn.json", code=1)
    assert "leave out --force-retrain-tokenizer" in said(
        *arguments, "tokenizer.path=artifacts/tokenizer/a", "--force-retrain-tokenizer", code=2
    )
    assert not Path("runs/b").exists()


def test_text_without_documents_or_too_short_for_a_validation_set(said: Callable[..., str]) -> None:
    Path("data/input.txt").write_text("<|endoftext|>\n\n<|endoftext|>\n")
    assert "holds no document" in said(*SMOKE, "--run-dir", "runs/none", code=1)
    Path("data/input.txt").write_text(STORIES[0])
    text = said(*SMOKE, "--run-dir", "runs/short", "tokenizer.vocab_size=270", code=1)
    assert "no document of data/input.txt falls to val: take more text" in text
    assert not Path("runs/none").exists() and not Path("runs/short").exists()


# -- the document


@contextmanager
def model_hub(folder: Path) -> Iterator[str]:
    """As much of the hub as it takes to download the files of a folder as those of any model; its address."""
    commit = "c" * 40
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            content, headers = b"", {"X-Repo-Commit": commit}
            if path.startswith("/api/models/") and "/tree/" in path:
                content = json.dumps(
                    [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
                ).encode()
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in files]
                content = json.dumps({"id": "OWNER/NAME", "sha": commit, "siblings": siblings}).encode()
            else:
                name = path.partition("/resolve/")[2].partition("/")[2]
                content = files[name]
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def run_tensorboard(words: list[str]) -> int:
    """Until it serves the runs."""
    process = subprocess.Popen(
        [program("tensorboard"), *words, "--port", "0", "--load_fast", "false"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://localhost:\d+", line)))
        with urllib.request.urlopen(f"{address}/data/runs", timeout=60) as answer:
            assert {"m3-medium", "slower"} <= {name.partition("/")[0] for name in json.load(answer)}
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    return 0


def run_documented(line: str, place: Path) -> int:
    """A command of the document, with the volume in a folder here, made a matter of a second."""
    words = [word.replace("/workspace", str(place / "volume")) for word in shlex.split(line)]
    assert words[:2] == ["uv", "run"] or words[0] == "runpodctl"
    match words[2:]:
        case ["transformerlm-pipeline", *arguments]:
            # The shape and arithmetic of the large profiles are their own tests' matter.
            return pipeline.main([*arguments, *TINY, *SMALL])
        case ["transformerlm-train", *arguments]:
            return train.main([*arguments, "training.max_steps=4"])
        case ["transformerlm-infer", *arguments]:
            return infer.main([*arguments, "--device=cpu", "inference.total_length=40"])
        case ["python", script, *arguments]:
            source = {"HuggingFaceFW/fineweb": str(place / "stories.jsonl"), "sample-10BT": ""}
            command = [sys.executable, str(ROOT / script), *(source.get(word, word) for word in arguments)]
            return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode
        case ["tensorboard", *arguments]:
            return run_tensorboard(arguments)
        case ["hf", *arguments]:
            with model_hub(place / "runs/local-smoke/checkpoints/best") as address:
                environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
                return subprocess.run([program("hf"), *arguments], env=environment, check=False).returncode
        case ["pod", *arguments]:
            return 0 if (ROOT / arguments[-1]).is_file() else 1  # tests/operations/test_infra.py runs what it starts
        case _:
            return 1


SMALL = ["model.d_ff=64", "model.num_kv_heads=2", "optimizer.kind=adamw", "training.compile=false"]


@pytest.mark.slow
def test_every_command_of_the_document_runs(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "volume").mkdir()
    monkeypatch.setenv(layout.ROOT_VARIABLE, str(place / "volume"))
    (place / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES * 2))
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) > 10
    for line in lines:
        if "--tokenizer-json tokenizer.json" in line:
            shutil.copy(place / "artifacts/tokenizer/local-smoke/tokenizer.json", place)
        assert run_documented(line, place) == 0, f"{line}\n{capfd.readouterr().err}"
    assert step_of("runs/m3-medium") == step_of("volume/runs/fineweb-2b") == step_of("runs/tuned") == 4
    assert "beginning with the weights of runs/pretrained" in Path("runs/tuned/log.txt").read_text()
