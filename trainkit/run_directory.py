"""The run directory: made once, resumed on purpose, and always able to say what ran and how it stands.

    config.toml, config.json    the settings as given and as resolved
    environment.json            what ran them: versions, machine, command
    status.json                 running | preempted | finished | failed
    summary.json                the result

The logs, plots and checkpoints beside them belong to `trainkit.logging`, `trainkit.plots` and `trainkit.checkpoints`.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

from trainkit.artifacts import publish_file
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.logging.jsonl import METRICS_FILE
from trainkit.logging.records import read_records

Status: TypeAlias = Literal["running", "preempted", "finished", "failed"]

MAY_CHANGE = (
    "run.name",
    "run.dir",
    "logging",
    "checkpoint",
    "distributed",
    "profiling",
    "data.cache_dir",
    "data.prefetch",
    "data.verify",
    "data.workers",
    "training.activation_checkpointing",
    "training.device",
    "training.threads",
    "training.device_batch_size",
    "training.log_every",
    "training.eval_every",
    "training.save_every",
    "training.sample_every",
    "training.skip_validation",
    "inference",
)
"""Settings, and tables with all below them, that may differ when a run resumes: they decide what is seen and kept of
it and where it runs, not which numbers it computes (beyond the order in which floats are added)."""

HORIZON = ("training.max_steps",)
"""What changes the learning rates of a run that goes on, and therefore wants `--new-horizon`."""

_MARKS_OF_A_RUN = ("config.json", METRICS_FILE, "checkpoints")
_TELLING_VARIABLES = (
    "CUDA_",
    "CUBLAS_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "TORCH",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)


def create_run_directory(
    path: Path | str,
    *,
    config_json: Mapping[str, Any],
    config_toml: str | None = None,
    resume: bool = False,
    allow: Sequence[str] = (),
) -> Path:
    """Make the directory of a new run, or take up that of an earlier one; the first rank calls it.

    A directory that holds a run already is refused without `resume`. With it, settings outside `MAY_CHANGE` and
    `allow` (dotted names or their prefixes) must be those of the run. With `resume` and no run there, a new one starts,
    so that a batch system can repeat the same command. Raises `UserError`.
    """
    path = Path(path)
    config = json.loads(json.dumps(finite(config_json)))  # as it reads back: tuples are lists
    try:
        if not holds_run(path):
            path.mkdir(parents=True, exist_ok=True)
        elif resume:
            _check_same_run(path, config, [*MAY_CHANGE, *allow])
        else:
            raise UserError(
                f"{path} holds a run already; continue it with --resume, or choose another run.name", EXIT_USAGE
            )
        if config_toml is not None:
            publish_file(path / "config.toml", config_toml)
        _publish_json(path / "environment.json", describe_environment())
        write_status(path, "running", step=read_status(path).get("step", 0))
        _publish_json(path / "config.json", config)  # last: it makes the directory a run
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {path}: {error.strerror or error}; choose another run.dir"
        ) from error
    return path


def holds_run(path: Path | str) -> bool:
    return any((Path(path) / name).exists() for name in _MARKS_OF_A_RUN)


def withdraw_run(path: Path | str) -> None:
    """Take back a new run that was refused before it computed anything: the corrected settings may begin it.

    What holds numbers or checkpoints stays a run. `status.json` and `log.txt` stay and say what was wrong.
    """
    path = Path(path)
    metrics, checkpoints = path / METRICS_FILE, path / "checkpoints"
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    if checkpoints.exists() or (metrics.exists() and any(r["kind"] != "message" for r in read_records(metrics))):
        return
    metrics.unlink(missing_ok=True)
    (path / "config.json").unlink(missing_ok=True)


@contextmanager
def hold_run_directory(path: Path | str) -> Generator[None]:
    """Let no other process write the run while the block runs; it is released however this process ends.

    `lockf` and not `flock`: the latter is inherited, and a data worker that outlives its killed parent would keep it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("wb")
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {path}: {error.strerror or error}; choose another run.dir"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks is no reason to refuse.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"another process is training in {path}; wait for it or stop it") from None
        yield


def set_aside(path: Path | str) -> None:
    """Rename a run directory out of the way, unless a process trains in it: nothing that was computed is deleted."""
    path = Path(path)
    if path.exists():
        number = next(n for n in count(1) if not path.with_name(f"{path.name}.before-{n}").exists())
        with hold_run_directory(path):
            path.rename(path.with_name(f"{path.name}.before-{number}"))


def write_status(path: Path | str, status: Status, *, step: int, message: str = "") -> None:
    """Replace `status.json`. Where exit codes get lost (under torchrun), it tells how the run ended."""
    _publish_json(Path(path) / "status.json", {"status": status, "step": step, "message": message, "time": time.time()})


def read_status(path: Path | str) -> dict[str, Any]:
    """What `write_status` wrote last; empty where nothing readable is."""
    return _read_object(Path(path) / "status.json")


def write_summary(path: Path | str, summary: Mapping[str, Any]) -> None:
    """Replace `summary.json`, the result of a run as one flat object."""
    _publish_json(Path(path) / "summary.json", summary)


def read_config(path: Path | str) -> dict[str, Any]:
    """The settings that the run began with, or resumed with; empty where there is no run."""
    return _read_object(Path(path) / "config.json")


def read_environment(path: Path | str) -> dict[str, Any]:
    """What ran it last (`describe_environment`); empty where nothing readable is."""
    return _read_object(Path(path) / "environment.json")


def read_summary(path: Path | str) -> dict[str, Any]:
    """What `write_summary` wrote last; empty where nothing readable is."""
    return _read_object(Path(path) / "summary.json")


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str]) -> dict[str, str]:
    """`{dotted name: "old -> new"}` of the settings that differ and may not."""
    before, after = _flatten(old), _flatten(new)
    return {
        name: f"{before.get(name, 'not set')} -> {after.get(name, 'not set')}"
        for name in [*before, *(name for name in after if name not in before)]
        if before.get(name) != after.get(name)
        and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in may_change)
    }


def describe_environment() -> dict[str, Any]:
    """What may explain a difference between two runs. Holds neither host nor user name, unless a path or flag does."""
    import torch  # here: who only reads a status need not wait for it

    has_cuda = torch.cuda.is_available()
    return {
        "time": time.time(),
        "command": shlex.join(sys.orig_argv),
        "git": _describe_git(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if has_cuda else None,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_cuda else [],
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_TELLING_VARIABLES)},
        "packages": dict(sorted((d.name, d.version) for d in importlib.metadata.distributions())),
    }


def _check_same_run(path: Path, config: Mapping[str, Any], may_change: Sequence[str]) -> None:
    try:
        old = json.loads((path / "config.json").read_bytes())
        changes = changed_settings(old, config, may_change)
    except (FileNotFoundError, ValueError, AttributeError):
        raise UserError(
            f"{path} cannot be resumed: its config.json is missing or damaged; put it back, or choose another run.name"
        ) from None
    if changes:
        lines = "".join(f"\n  {name}: {change}" for name, change in changes.items())
        way_out = " (or add --new-horizon to train longer or shorter)" if set(changes) <= set(HORIZON) else ""
        raise UserError(
            f"{path} cannot be resumed with other settings than it began with; "
            f"restore these{way_out}, or choose another run.name:{lines}",
            EXIT_USAGE,
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a.b": JSON text}`; lists are values. JSON text tells `true` from `1`, and NaN equals itself there."""
    flat: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat


def _publish_json(path: Path, content: Mapping[str, Any]) -> None:
    publish_file(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, however deep: JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_git() -> dict[str, Any] | None:
    """Commit of the repository that the command ran in, and whether tracked files differ from it."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))} if commit else None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
