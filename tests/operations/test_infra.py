"""What runs on pods, under SLURM and in containers, with stand-ins for what is not here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
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
        timeout=60,
    )
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


def test_a_pod_trains_the_profile_that_is_named(checkout: Path) -> None:
    root = checkout / "volume"
    pod = str(checkout / "infra" / "start_pod.sh")
    pipeline = "uv run transformerlm-pipeline --mode cloud --profile"
    code, asked, said = run(checkout, pod, CLOUD_ROOT=str(root))
    assert code == 0, said
    assert len(asked) == 1 and asked[0].startswith(f"{pipeline} runpod_2b --input {root}/datasets/train/fineweb")
    assert {path.name for path in root.iterdir()} == {"datasets", "artifacts", "runs", "hf_cache"}

    settings = {"RUN_CONFIG": "m3_medium", "RUN_SHARD": "1", "RUN_DATASET": "my.jsonl", "RUN_EXPERIMENT": "mine"}
    code, asked, _ = run(checkout, pod, "--max-steps", "5", CLOUD_ROOT=str(root), **settings)
    assert code == 0 and len(asked) == 2
    assert asked[0].startswith("uv run python scripts/shard_dataset.py --dataset my.jsonl")
    assert asked[1].startswith(f"{pipeline} m3_medium") and asked[1].endswith("--max-steps 5")
    code, _, said = run(checkout, pod, CLOUD_ROOT=str(root), RUN_SHARD="yes")
    assert code == 2 and "must be 0 or 1" in said


def test_the_sharder_takes_what_the_pod_gives_it(checkout: Path) -> None:
    """The real one, on a file."""
    (checkout / "my.jsonl").write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(200)))
    stand_in(checkout, "uv", f'[[ $2 != python ]] || exec "{sys.executable}" "${{@:3}}"')
    settings = {"RUN_SHARD": "1", "RUN_DATASET": str(checkout / "my.jsonl"), "RUN_DATASET_CONFIG": ""}
    code, _, said = run(
        checkout,
        *(str(checkout / "infra" / "start_pod.sh"),),
        **settings,
        CLOUD_ROOT=str(checkout / "volume"),
        PYTHONPATH=str(ROOT),
    )
    assert code == 0, said
    assert list((checkout / "volume" / "datasets" / "train" / "fineweb").iterdir())


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
