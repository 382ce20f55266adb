"""What runs on pods, under SLURM and in containers, with stand-ins for what is not here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("scripts", "infra"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "env").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "bin").mkdir()
    # uv tells what it is asked for; Python it runs, and the configuration it knows.
    stand_in(
        tmp_path,
        "uv",
        'if [[ $* == *--print-config* ]]; then echo \'{"run": {"dir": "runs", "name": "job"}}\'; exit; fi\n'
        f'if [[ $2 == python && $3 == -c ]]; then exec "{sys.executable}" "${{@:3}}"; fi\n'
        'printf "%s\\n" "uv $*" >>"$LOG"',
    )
    return tmp_path


def stand_in(checkout: Path, name: str, script: str) -> None:
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run(checkout: Path, *words: str, **variables: str) -> tuple[int, list[str], str]:
    """Exit code, what the stand-ins were asked for, and what was said."""
    log = checkout / "log"
    log.unlink(missing_ok=True)
    base = {key: value for key, value in os.environ.items() if not key.startswith(("RUN_", "SLURM_", "HF_"))}
    done = subprocess.run(
        words,
        cwd=checkout,
        env={
            **base,
            "PATH": f"{checkout / 'bin'}:{base['PATH']}",
            "HOME": str(checkout),
            "LOG": str(log),
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


def test_a_pod_trains_the_profile_that_is_named(checkout: Path) -> None:
    root = checkout / "volume"
    pod = str(checkout / "infra" / "start_pod.sh")
    code, _, said = run(checkout, pod, CLOUD_ROOT=str(root))
    assert code == 1 and "mount the volume there" in said and not root.exists()
    root.mkdir()
    pipeline = f"uv run transformerlm-pipeline --mode cloud --root {root} --profile"
    code, asked, said = run(checkout, pod, CLOUD_ROOT=str(root))
    assert code == 0, said
    assert len(asked) == 1 and asked[0].startswith(f"{pipeline} runpod_2b --input {root}/datasets/train/fineweb")
    assert asked[0].endswith(f"--run-dir {root}/runs/runpod_2b")
    assert {path.name for path in root.iterdir()} == {"datasets", "artifacts", "runs", "hf_cache"}

    settings = {"RUN_CONFIG": "m3_medium", "RUN_SHARD": "1", "RUN_DATASET": "my.jsonl", "RUN_EXPERIMENT": "mine"}
    code, asked, _ = run(checkout, pod, "--max-steps", "5", CLOUD_ROOT=str(root), **settings)
    assert code == 0 and len(asked) == 2
    assert asked[0].startswith("uv run python scripts/shard_dataset.py --dataset my.jsonl")
    assert asked[1].startswith(f"{pipeline} m3_medium") and asked[1].endswith("--max-steps 5")
    _, asked, _ = run(checkout, pod, CLOUD_ROOT=str(root), RUN_CONFIG="my/own.toml")
    assert "--profile my/own.toml" in asked[0] and asked[0].endswith("/runs/own")
    code, _, said = run(checkout, pod, CLOUD_ROOT=str(root), RUN_SHARD="yes")
    assert code == 2 and "must be 0 or 1" in said


def test_a_pod_lets_in_whoever_has_the_key(checkout: Path) -> None:
    root = checkout / "volume"
    root.mkdir()
    for name in ("sshd", "ssh-keygen"):
        stand_in(checkout, name, f'echo "{name} $*" >>"$LOG"')
    pod = str(checkout / "infra" / "start_pod.sh")
    for _ in range(2):  # a pod starts again
        code, asked, said = run(checkout, pod, CLOUD_ROOT=str(root), PUBLIC_KEY="ssh-ed25519 AAAA me@laptop")
        assert code == 0, said
        assert asked[:2] == ["ssh-keygen -A", "sshd "] and asked[2].startswith("uv run transformerlm-pipeline")
    keys = checkout / ".ssh" / "authorized_keys"
    assert keys.read_text() == "ssh-ed25519 AAAA me@laptop\n"
    assert keys.stat().st_mode & 0o777 == 0o600 and keys.parent.stat().st_mode & 0o777 == 0o700


def test_the_sharder_takes_what_the_pod_gives_it(checkout: Path) -> None:
    """The real one, on a file."""
    (checkout / "my.jsonl").write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(200)))
    stand_in(checkout, "uv", f'[[ $2 != python ]] || exec "{sys.executable}" "${{@:3}}"')
    settings = {"RUN_SHARD": "1", "RUN_DATASET": str(checkout / "my.jsonl"), "RUN_DATASET_CONFIG": ""}
    (checkout / "volume").mkdir()
    code, _, said = run(
        checkout,
        *(str(checkout / "infra" / "start_pod.sh"),),
        **settings,
        CLOUD_ROOT=str(checkout / "volume"),
        PYTHONPATH=str(ROOT),
    )
    assert code == 0, said
    assert list((checkout / "volume" / "datasets" / "train" / "fineweb").iterdir())


TINY = f"""\
extends = "{ROOT}/config/resources/local.toml"
[model]
context_length = 32
num_layers = 1
d_model = 32
num_heads = 2
[training]
max_steps = 6
total_batch_size = 128
device_batch_size = 4
log_every = 1
eval_every = 0
save_every = 0
precision = "fp32"
threads = 1
[schedule]
warmup_steps = 2
[logging]
plots = false
tensorboard = false
[inference]
prompts = []
"""


@pytest.fixture
def pod(checkout: Path) -> dict[str, str]:
    """A checkout whose commands are the real ones, a volume, and stories to shard; what the pod's settings are."""
    for folder in ("volume", "home"):
        (checkout / folder).mkdir()
    (checkout / "tiny.toml").write_text(TINY)
    rows = ({"text": f"The mouse number {i} has {i * i} pieces of cheese and {i % 7} friends."} for i in range(400))
    (checkout / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stand_in(
        checkout,
        "uv",
        f'[[ $2 == python ]] && exec "{sys.executable}" "${{@:3}}"\n'
        f'[[ $2 == transformerlm-pipeline ]] && exec "{sys.executable}" -m cli.pipeline "${{@:3}}"\nexit 9',
    )
    return {
        "CLOUD_ROOT": str(checkout / "volume"),
        "RUN_CONFIG": str(checkout / "tiny.toml"),
        "RUN_DATASET": str(checkout / "my.jsonl"),
        "RUN_EXPERIMENT": "mice",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def status(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.slow
def test_a_pod_shards_and_trains_for_real(checkout: Path, pod: dict[str, str]) -> None:
    script, volume = str(checkout / "infra" / "start_pod.sh"), checkout / "volume"
    code, _, said = run(checkout, script, **pod, RUN_SHARD="0")
    assert code == 1 and "datasets/train/mice does not exist" in said
    code, _, said = run(checkout, script, **pod, RUN_SHARD="1")
    assert code == 0, said
    assert "documents in 1 shard, as manifest.json says" in said
    assert status(volume / "runs" / "tiny") | {"time": 0} == {"status": "finished", "step": 6, "message": "", "time": 0}
    assert (volume / "artifacts" / "tokenizer" / "mice" / "tokenizer.json").exists()
    assert (volume / "artifacts" / "tokens" / "mice" / "val.bin").exists()
    assert (volume / "artifacts" / "tiny" / "train.toml").exists()

    # Another profile on the same shards: what is made already serves it too.
    settings = ["model.num_layers=1", "model.d_model=32", "training.max_steps=2", "training.threads=1"]
    code, _, said = run(checkout, script, *settings, **{**pod, "RUN_CONFIG": "local"})
    assert code == 0, said
    assert "tokenizer/mice, as it is" in said and said.count("up to date") == 2
    assert status(volume / "runs" / "local")["status"] == "finished"

    shard = volume / "datasets" / "train" / "mice" / "shard-00000.lines"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, said = run(checkout, script, **pod)
    assert code == 1 and "shard-00000.lines has" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_pod_that_is_stopped_saves_and_goes_on(checkout: Path, pod: dict[str, str]) -> None:
    """SIGTERM to the script is what `docker stop` sends."""
    command = [str(checkout / "infra" / "start_pod.sh"), "training.max_steps=100000", "training.save_every=50"]
    base = {key: value for key, value in os.environ.items() if not key.startswith(("RUN_", "HF_"))}
    variables = {**base, **pod, "RUN_SHARD": "1", "PATH": f"{checkout / 'bin'}:{base['PATH']}"}
    metrics = checkout / "volume" / "runs" / "tiny" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=checkout, env=variables, stdout=subprocess.DEVNULL)
    try:
        while not (metrics.exists() and '"step": 60,' in metrics.read_text()) and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 75
    finally:
        process.kill()
    stopped = status(metrics.parent)
    assert stopped["status"] == "preempted" and isinstance(stopped["step"], int)
    code, _, said = run(checkout, command[0], f"training.max_steps={stopped['step'] + 2}", "--new-horizon", **pod)
    assert code == 0, said
    assert status(metrics.parent)["step"] == stopped["step"] + 2


@pytest.mark.parametrize(
    ("nodes", "exit_code", "status", "requeued", "expected"),
    [
        ("1", 0, "finished", False, 0),
        ("1", 75, "preempted", True, 0),
        ("1", 1, "failed", False, 1),
        ("1", 1, None, False, 1),
        ("2", 1, "preempted", True, 0),
        ("2", 0, "finished", False, 0),
    ],
)
def test_a_job_goes_into_the_queue_again(
    checkout: Path, nodes: str, exit_code: int, status: str | None, requeued: bool, expected: int
) -> None:
    stand_in(checkout, "srun", f'printf "%s\\n" "srun $*" >>"$LOG"; exit {exit_code}')
    stand_in(checkout, "scontrol", 'if [[ $1 == show ]]; then echo first; else echo "scontrol $*" >>"$LOG"; fi')
    if status is not None:
        (checkout / "runs" / "job").mkdir()
        (checkout / "runs" / "job" / "status.json").write_text(json.dumps({"status": status}))
    variables = {"SLURM_NNODES": nodes, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}
    code, asked, said = run(checkout, "bash", "infra/train.sbatch", "--config", "my.toml", **variables)
    assert code == expected, said
    assert ("scontrol requeue 7" in asked) == requeued
    assert asked[0].endswith("cli.train --config my.toml --resume")
    assert ("--rdzv-endpoint first:29500" in asked[0]) == (nodes == "2")


def test_the_job_asks_for_a_signal_and_for_requeuing() -> None:
    text = (ROOT / "infra" / "train.sbatch").read_text()
    assert "#SBATCH --requeue" in text and re.search(r"#SBATCH --signal=TERM@\d+", text)
    assert text.index("#SBATCH --output") < text.index("set -euo"), "SLURM reads no directive after the first command"


def test_the_pod_is_what_was_promised() -> None:
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load((ROOT / "infra" / "runpod-pod.yaml").read_text())
    assert pod["gpuTypeId"] == "NVIDIA A100 80GB PCIe" and pod["gpuCount"] == 1
    assert pod["volumeInGb"] > 0 and pod["volumeMountPath"] == pod["env"]["CLOUD_ROOT"] == "/workspace"
    assert pod["env"]["RUN_CONFIG"] == "runpod_2b" and pod["env"]["RUN_SHARD"] == "0"
    assert (ROOT / shlex.split(pod["dockerArgs"])[-1]).is_file()
    assert all("SECRET" in value for name, value in pod["env"].items() if name.endswith(("TOKEN", "KEY")))


def test_an_image_holds_the_project_and_no_secret() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and not line.startswith("COPY . "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".env", "env/*.env", ".git", "runs", "data"} <= set(ignored)
    script = re.search(r"CMD \[\"([\w-]+)\"", "\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert script is not None and script[1] in project["scripts"]


def test_secrets_are_ignored_by_git() -> None:
    for name in (".env", "env/wandb.env", "env/machine.env"):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False)
        assert done.returncode == 0, f"{name} could be committed"
    for name in (".env.example", "env/wandb.env.example"):
        assert (ROOT / name).is_file()
        values = [line.partition("=")[2] for line in (ROOT / name).read_text().splitlines() if "KEY=" in line]
        assert not any(values), f"{name} holds a key"
