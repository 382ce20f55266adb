"""Checkpoint directories: whole or absent, verified before they are believed, pruned only behind a good one.

Layout of `<run>/checkpoints/step-00000420/` (tensors and JSON only, no pickle):

    model.safetensors            weights by parameter name, without wrapper prefixes
    ema.safetensors              averaged weights, where kept
    optimizer-00000.safetensors  optimizer tensors by parameter name, each parameter whole in one of these shards
    optimizer.index.json         which shard holds what
    trainer.json                 step, samples, position in the data, horizon, best metric, open sums of the log,
                                 how far the log is, and which run of another service it feeds
    …                            whatever the run adds (`model.json`, `tokenizer/`)
    manifest.json                bytes and SHA-256 of every file

`latest` and `best` are relative links for people; the code recomputes what they mean. Who calls `save_checkpoint`, and
when, is `trainkit.checkpoint_writer`; what stays is `trainkit.retention`.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from trainkit import artifacts
from trainkit.artifacts import (
    explain_failed_writes,
    is_sealed,
    publish_directory,
    remove_leftovers,
    set_damaged_aside,
    verify_directory,
)
from trainkit.errors import UserError
from trainkit.retention import apply_retention
from trainkit.specs import CheckpointSpec

FORMAT = 2
SHARD_BYTES = 4 << 30
"""An optimizer state that is larger goes into several files."""
_STEP = re.compile(r"step-(\d{8,})")
_MODEL, _AVERAGE, _TRAINER = "model.safetensors", "ema.safetensors", "trainer.json"
_OPTIMIZER_INDEX = "optimizer.index.json"


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs in order to go on as if nothing had happened."""

    trainer: dict[str, Any]
    """Plain JSON values; `step` among them."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    average: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    starts_optimizer_anew: bool = False
    """Whether a run that goes on from here does so with a fresh optimizer."""


@dataclass(frozen=True)
class CheckpointStore:
    """Where checkpoints live and how they are kept."""

    root: Path
    spec: CheckpointSpec
    write_assets: Callable[[Path], None] = lambda directory: None
    """Adds the run's own files (a model's description, its tokenizer) to a checkpoint being written."""
    report: Callable[[str], None] = print
    """Tells a person what happened, one sentence at a time."""
    saved: Callable[[int], None] = lambda step: None
    """Called with the step of each checkpoint once it is there."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tensor that has two names (tied weights) is stored once."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    persistent = model.state_dict().keys()
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into the model; names and shapes must match exactly."""
    own = model_tensors(model)
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model wants {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:3])
        raise UserError(f"{source} does not fit this model ({listed}); use the configuration it was trained with")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def copy_to_host(snapshot: Snapshot) -> Snapshot:
    """The same state in memory of its own, which no later training step can touch."""
    artifacts.step_hook("snapshot")
    trainer = json.loads(json.dumps(snapshot.trainer))
    model, optimizer, average = (_copied(part) for part in (snapshot.model, snapshot.optimizer, snapshot.average))
    return replace(snapshot, trainer=trainer, model=model, optimizer=optimizer, average=average)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Into pages of their own. On the heap, large copies that come and go change where a training step's temporaries
    lie, which makes all steps until the next save slower or faster."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size < mmap.PAGESIZE:
            copies[name] = tensor.detach().contiguous().to("cpu", copy=True)
        else:
            copies[name] = torch.frombuffer(mmap.mmap(-1, size), dtype=tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor.detach())
    return copies


def non_finite_tensors(snapshot: Snapshot) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN. Reads each number once, on its device, and waits once."""
    parts = {"model": snapshot.model, "optimizer": snapshot.optimizer, "average": snapshot.average}
    tensors = {f"{part}/{name}": t.detach() for part, named in parts.items() for name, t in named.items()}
    tensors = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    bad: list[str] = []
    for device in sorted({str(t.device) for t in tensors.values()}):
        here = {name: t for name, t in tensors.items() if str(t.device) == device}
        # The largest magnitude: no sum that could overflow, no temporary of the tensor's size, and NaN wins.
        largest = [torch.linalg.vector_norm(t, math.inf, dtype=torch.float32) for t in here.values()]
        finite = torch.stack(largest).isfinite().tolist()
        bad += [name for name, is_finite in zip(here, finite, strict=True) if not is_finite]
    return bad


def snapshot_bytes(snapshot: Snapshot) -> int:
    """Bytes of all tensors, about what the checkpoint takes on the disk."""
    parts = (snapshot.model, snapshot.optimizer, snapshot.average)
    return sum(t.numel() * t.element_size() for part in parts for t in part.values())


def save_checkpoint(store: CheckpointStore, snapshot: Snapshot) -> Path:
    """Publish `snapshot`; when it has been read back intact, update the links and prune. Returns its directory.

    On a `UserError` (a full disk, for instance) nothing of it is there, and all that was there still is.
    """
    step = int(snapshot.trainer["step"])
    path = store.root / f"step-{step:08d}"
    if path.exists() and not is_sealed(path, kind="checkpoint"):
        # Damaged, and passed over when the run resumed: by its name it is ours, so it may go.
        set_damaged_aside(path)
    with publish_directory(path, replace=True, extra={"kind": "checkpoint", "step": step}) as directory:
        _write_tensors(directory / _MODEL, snapshot.model)
        if snapshot.average:
            _write_tensors(directory / _AVERAGE, snapshot.average)
        if snapshot.optimizer:
            _write_optimizer(directory, snapshot.optimizer)
        trainer = {"format": FORMAT, **snapshot.trainer}
        (directory / _TRAINER).write_text(json.dumps(trainer, indent=1) + "\n", encoding="utf-8")
        store.write_assets(directory)
    artifacts.step_hook("verify")
    verify_directory(path)
    with explain_failed_writes(store.root):
        steps = [checkpoint_step(p) for p in list_checkpoints(store.root)]
        apply_retention(store.root, store.spec, steps, newest=step, best=snapshot.trainer.get("best", {}).get("step"))
    store.saved(step)
    return path


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint directories by ascending step; whether they are intact is not known yet."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match, path
    return int(match[1])


def find_newest_intact(store: CheckpointStore) -> Path | None:
    """The newest checkpoint of one's own run that verifies; each damaged one on the way is reported and passed over."""
    if store.root.is_dir():
        remove_leftovers(store.root)
    return newest_intact(store.root, store.report)


def newest_intact(root: Path, report: Callable[[str], None]) -> Path | None:
    """The same for a directory that may have another writer: nothing in it is touched."""
    for path in reversed(list_checkpoints(root)):
        try:
            verify_directory(path)
        except UserError as error:
            report(f"{error}; trying an older checkpoint")
        else:
            return path
    return None


def load_snapshot(path: Path) -> Snapshot:
    """Read a verified checkpoint, tensors on the CPU. A `UserError` when it is of an older format, or gone."""
    with _still_there(path):
        return _load_snapshot(path)


def _load_snapshot(path: Path) -> Snapshot:
    trainer = json.loads((path / _TRAINER).read_text(encoding="utf-8"))
    if trainer.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {trainer.get('format')} and this version resumes from format {FORMAT}: go on with the "
            "version of the project that wrote it, or take over its weights with checkpoint.init_from"
        )
    optimizer: dict[str, Tensor] = {}
    if (path / _OPTIMIZER_INDEX).exists():
        index = json.loads((path / _OPTIMIZER_INDEX).read_text(encoding="utf-8"))
        for name in sorted(set(index.values())):
            optimizer |= safetensors.torch.load_file(path / name)
    average = safetensors.torch.load_file(path / _AVERAGE) if (path / _AVERAGE).exists() else {}
    return Snapshot(trainer, safetensors.torch.load_file(path / _MODEL), optimizer, average)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a verified checkpoint of any format, on the CPU."""
    with _still_there(path):
        return safetensors.torch.load_file(path / _MODEL)


@contextmanager
def _still_there(path: Path) -> Generator[None]:
    """Another run's checkpoint may be pruned by that run between a look and the next."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is gone: its run has pruned it meanwhile; start again, or name another") from None


def _write_optimizer(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for parameter in sorted({name.rsplit("/", 1)[0] for name in tensors}):
        states = {name: t for name, t in tensors.items() if name.rsplit("/", 1)[0] == parameter}
        size = sum(t.numel() * t.element_size() for t in states.values())
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1] |= states
        used += size
    files = {f"optimizer-{number:05d}.safetensors": shard for number, shard in enumerate(shards)}
    for name, shard in files.items():
        _write_tensors(directory / name, shard)
    index = {tensor: name for name, shard in files.items() for tensor in sorted(shard)}
    (directory / _OPTIMIZER_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        safetensors.torch.save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # how the library reports a full disk, too
        raise OSError(str(error)) from error
