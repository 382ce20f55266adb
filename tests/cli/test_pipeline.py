"""The pipeline and training from outside: one command from text to stories, skipped where done, resumed where not."""

from __future__ import annotations

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
import safetensors.torch
import torch

from cli import pipeline, train
from trainkit.checkpoints import list_checkpoints
from trainkit.comparing import MEASURED
from trainkit.interrupts import Interrupts

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
SMALL = [
    "--config-name",
    "quickstart",
    "run.name=small",
    "corpus.num_train_stories=300",
    "corpus.num_val_stories=12",
    "tokenizer.vocab_size=600",
    "model.num_layers=1",
    "model.d_model=32",
    "model.num_heads=2",
    "model.context_length=64",
    "training.total_batch_size=512",
    "training.device_batch_size=4",
    "training.max_steps=30",
    "training.log_every=4",
    "training.eval_every=10",
    "training.save_every=7",
    "training.sample_every=0",
    "training.threads=1",
    "training.ema_decay=0.9",
    "inference.total_length=24",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if not MEASURED.fullmatch(k)} for line in lines]
    return [record for record in found if record["kind"] != "message"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = list_checkpoints(run / "checkpoints")[-1]
    files = ["model.safetensors", "ema.safetensors", "optimizer-00000.safetensors"]
    return {f"{file}/{name}": t for file in files for name, t in safetensors.torch.load_file(newest / file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_one_command_leaves_everything_and_the_second_time_does_nothing(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main(SMALL) == 0
    out, err = capfd.readouterr()
    run = place / "runs" / "small"
    assert {p.name for p in (run / "plots").glob("*.png")} >= {"loss.png", "learning_rate.png", "gradient_norm.png"}
    for name in ("config.toml", "config.json", "environment.json", "summary.json", "metrics.csv", "log.txt"):
        assert (run / name).stat().st_size > 0, name
    assert "Once upon a time" in (run / "samples.md").read_text()
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 30 and summary["excess_ratio"] > 0 and summary["val_bits_per_byte"] > 0
    assert "up to date" not in err and "excess" in out

    before = {p: p.stat().st_mtime_ns for p in place.rglob("*.safetensors")} | {
        p: p.stat().st_mtime_ns for p in place.rglob("*.bin")
    }
    assert pipeline.main([*SMALL, "--verify"]) == 0
    err = capfd.readouterr().err
    assert err.count("up to date") == 3 and "is finished" in err
    assert before == {p: p.stat().st_mtime_ns for p in before}

    # The configuration that it wrote is one that transformerlm-train runs unchanged.
    assert train.main(["--config", "artifacts/quickstart/train.toml", "run.name=again"]) == 0
    assert same(weights(run), weights(place / "runs" / "again"))


def test_damage_is_noticed_and_force_makes_everything_again(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([*SMALL, "--max-steps", "2"]) == 0
    tokens = place / "artifacts" / "quickstart" / "tokens" / "train.bin"
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    capfd.readouterr()
    assert pipeline.main([*SMALL, "--max-steps", "2", "--verify"]) == 1
    assert "train.bin" in capfd.readouterr().err
    assert pipeline.main([*SMALL, "--max-steps", "2", "--force"]) == 0
    assert pipeline.main([*SMALL, "--max-steps", "2", "--verify"]) == 0
    assert (place / "runs" / "small.before-1" / "summary.json").exists()


def test_another_configuration_does_not_continue_the_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([*SMALL, "--max-steps", "2"]) == 0
    capfd.readouterr()
    assert pipeline.main([*SMALL, "--max-steps", "3"]) == 2
    err = capfd.readouterr().err
    assert "training.max_steps: 2 -> 3" in err and "Traceback" not in err


def test_a_finished_run_of_other_data_is_not_taken_for_this_one(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([*SMALL, "--max-steps", "2"]) == 0
    capfd.readouterr()
    for change in ("corpus.seed=7", "corpus.num_val_stories=9", "tokenizer.vocab_size=500"):
        assert pipeline.main([*SMALL, "--max-steps", "2", change]) == 2
        err = capfd.readouterr().err
        assert "inputs." in err and "run.name" in err and "Traceback" not in err
    assert pipeline.main([*SMALL, "--max-steps", "2"]) == 0


LONG = ["model.context_length=2048", "training.total_batch_size=4096"]


def test_what_fails_at_the_end_is_refused_at_the_beginning(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([*SMALL, 'inference.prompts=["' + "word " * 80 + '"]']) == 2
    assert "prompt" in capfd.readouterr().err
    assert pipeline.main([*SMALL, "corpus.num_train_stories=2", "tokenizer.vocab_size=300", *LONG]) == 1
    assert "shorter context_length" in capfd.readouterr().err
    assert not (place / "runs").exists()
    assert pipeline.main([*SMALL, "--max-steps", "2", "inference.prompts=[]"]) == 0


def test_a_run_keeps_the_precision_it_began_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [*SMALL, "--max-steps", "2", "training.precision=auto"]
    for is_native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=is_native: answer)
        assert pipeline.main(short) == 0
    assert json.loads((place / "runs/small/config.json").read_text())["training"]["precision"] == "bf16"


def test_a_missing_summary_is_made_again(place: Path) -> None:
    test_split = [*SMALL, "--max-steps", "2", "corpus.num_test_stories=5"]
    assert pipeline.main(test_split) == 0
    (place / "runs/small/summary.json").unlink()
    assert pipeline.main(test_split) == 0
    summary = json.loads((place / "runs/small/summary.json").read_text())
    assert "stories" in summary
    assert (summary["val_documents"], summary["test_documents"]) == (12, 5) and summary["test_loss"] > 0
    assert train.main(["--config", "runs/small/config.toml", "--resume"]) == 0  # has nothing to do
    again = json.loads((place / "runs/small/summary.json").read_text())
    assert again == {**summary, "status": "finished", "step": 2, "best": again["best"]}


def test_a_run_that_keeps_no_optimizer_resumes_after_an_interrupt_and_after_its_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = [*SMALL, "checkpoint.save_optimizer=false", "training.save_every=0", "training.eval_every=0"]
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "requested", property(lambda self: next(calls) >= 4))
        assert pipeline.main(lean) == 75
    assert json.loads((place / "runs/small/status.json").read_text()) | {"time": 0} == {
        "status": "preempted",
        "step": 5,
        "message": "",
        "time": 0,
    }
    last = json.loads((place / "runs/small/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 5 and "stopped at step 5" in last["text"] and "run the same command again" in last["text"]
    assert pipeline.main(lean) == 0
    assert train.main(["--config", "artifacts/quickstart/train.toml", "--resume"]) == 0


def test_what_is_replaced_is_named_and_another_horizon_needs_its_flag(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main([*SMALL, "--max-steps", "2"]) == 0
    assert "replacing" not in capfd.readouterr().err
    assert pipeline.main([*SMALL, "--max-steps", "4"]) == 2
    assert "add --new-horizon" in capfd.readouterr().err
    assert pipeline.main([*SMALL, "--max-steps", "4", "--new-horizon"]) == 0
    assert json.loads((place / "runs/small/summary.json").read_text())["step"] == 4
    capfd.readouterr()
    other = [*SMALL, "--max-steps", "1", "run.name=other", "corpus.num_train_stories=290", "tokenizer.vocab_size=590"]
    assert pipeline.main(other) == 0
    told = capfd.readouterr().err
    assert "replacing artifacts/quickstart/tokenizer (tokenizer.vocab_size was 600, is 590)" in told
    assert "in place of earlier ones (corpus.num_train_stories was 300, is 290; another artifacts.dir" in told


def test_train_refuses_an_existing_run_and_files_of_another_tokenizer(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main([*SMALL, "--max-steps", "2"]) == 0
    config = ["--config", "artifacts/quickstart/train.toml"]
    capfd.readouterr()
    assert train.main(config) == 2
    assert "--resume" in capfd.readouterr().err
    assert train.main([*config, "--resume"]) == 0
    (place / "other").mkdir()
    assert (
        pipeline.main([*SMALL, "artifacts.dir=other", "run.name=other", "tokenizer.vocab_size=500", "--max-steps=2"])
        == 0
    )
    capfd.readouterr()
    assert train.main([*config, "run.name=mixed", "tokenizer.path=other/tokenizer"]) == 1
    err = capfd.readouterr().err
    assert "tokenizer" in err and "Traceback" not in err and not (place / "runs" / "mixed").exists()


def run_and_interrupt(arguments: list[str], place: Path, after_step: int, how: signal.Signals) -> int:
    """Start the real command, send a signal once `after_step` has been logged, and return the exit code."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cli.train import main; sys.exit(main())"
    metrics = place / "runs" / "cut" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=place, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if any(f'"step": {step},' in line for line in lines[-3:] for step in range(after_step, after_step + 9)):
            process.send_signal(how)
            break
        time.sleep(0.002)
    return process.wait(timeout=120)


@pytest.mark.slow
def test_signals_in_real_processes_lose_nothing(place: Path) -> None:
    """SIGINT and SIGTERM at random steps, exit code 75, resume: the end is that of the undisturbed run, to the bit."""
    small = [*SMALL, "training.max_steps=60", "training.log_every=1"]
    assert pipeline.main(small) == 0
    config = ["--config", "artifacts/quickstart/train.toml", "run.name=cut", "--resume"]
    draw, codes, step = random.Random(5), [], 0
    while not codes or codes[-1] != 0:
        step += draw.randint(4, 9)
        codes.append(run_and_interrupt(config, place, step, draw.choice([signal.SIGINT, signal.SIGTERM])))
    assert codes.count(75) >= 4 and codes[-1] == 0
    assert same(weights(place / "runs" / "small"), weights(place / "runs" / "cut"))
    assert records(place / "runs" / "cut") == records(place / "runs" / "small")


@pytest.mark.slow
def test_two_ranks_under_torchrun_train_the_same_model(place: Path) -> None:
    assert pipeline.main(SMALL) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "cli.train",
    ]
    arguments = ["--config", "artifacts/quickstart/train.toml", "run.name=two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
    again = subprocess.run([*command, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    assert again.returncode != 0 and again.stderr.count("--resume") == 1 and "RuntimeError" not in again.stderr
    one, two = (records(place / "runs" / name) for name in ("small", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for mine, theirs in zip(one, two, strict=True):
        for name in {"loss", "val_loss", "gradient_norm"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), (mine["step"], name)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the TinyStories excerpt is not there")
def test_real_text_by_overrides_of_the_shipped_configuration(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from cli import infer

    tiny = [argument for argument in SMALL[2:] if not argument.startswith("corpus.")]
    files = [
        "corpus.kind=files",
        f'corpus.train_paths=["{SHARED}/tinystories_train.jsonl"]',
        f'corpus.val_paths=["{SHARED}/tinystories_val.jsonl"]',
    ]
    assert pipeline.main(["--config-name", "tinystories", *tiny, *files]) == 0
    capfd.readouterr()
    assert infer.main(["--checkpoint", "runs/small", "--prompt", "Once upon a time"]) == 0
    assert capfd.readouterr().out.startswith("Once upon a time")
