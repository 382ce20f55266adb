"""Checkpoint directories: whole or absent, verified before they are believed, pruned only behind a good one.

Layout of `<run>/checkpoints/step-00000420/` (tensors and JSON only, no pickle):

    model.safetensors            weights by parameter name, without wrapper prefixes
    ema.safetensors              averaged weights, where kept
    optimizer-00000.safetensors  optimizer tensors by parameter name; `optimizer.index.json` says which file holds what
    trainer.json                 step, samples, position in the data, best metric, open sums of the log, offsets
    …                            whatever the run adds (`model.json`, `tokenizer/`)
    manifest.json                bytes and SHA-256 of every file

`latest` and `best` are relative links for people; the code recomputes what they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from trainkit.artifacts import TEMPORARY_MARK, is_sealed, publish_directory, remove_leftovers, verify_directory
from trainkit.errors import UserError
from trainkit.specs import CheckpointSpec

FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")
_MODEL, _AVERAGE, _TRAINER = "model.safetensors", "ema.safetensors", "trainer.json"
_OPTIMIZER, _OPTIMIZER_INDEX = "optimizer-00000.safetensors", "optimizer.index.json"


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs in order to go on as if nothing had happened."""

    trainer: dict[str, Any]
    """Plain JSON values; `step` among them."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    average: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


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


def save_checkpoint(store: CheckpointStore, snapshot: Snapshot) -> Path:
    """Publish `snapshot`; when it has been read back intact, update the links and prune. Returns its directory."""
    step = int(snapshot.trainer["step"])
    path = store.root / f"step-{step:08d}"
    if path.exists() and not is_sealed(path, kind="checkpoint"):
        # Damaged, and passed over when the run resumed: by its name it is ours, so it may go.
        path.rename(path.with_name(f".{path.name}{TEMPORARY_MARK}damaged"))
    with publish_directory(path, replace=True, extra={"kind": "checkpoint", "step": step}) as directory:
        _write_tensors(directory / _MODEL, snapshot.model)
        if snapshot.average:
            _write_tensors(directory / _AVERAGE, snapshot.average)
        if snapshot.optimizer:
            _write_tensors(directory / _OPTIMIZER, snapshot.optimizer)
            index = dict.fromkeys(sorted(snapshot.optimizer), _OPTIMIZER)
            (directory / _OPTIMIZER_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        trainer = {"format": FORMAT, **snapshot.trainer}
        (directory / _TRAINER).write_text(json.dumps(trainer, indent=1) + "\n", encoding="utf-8")
        store.write_assets(directory)
    verify_directory(path)
    best_step = snapshot.trainer.get("best", {}).get("step")
    _update_links(store.root, path, best_step)
    _prune(store, newest=step, best=best_step)
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
    """The newest checkpoint that verifies; each damaged one on the way is reported and passed over."""
    if store.root.is_dir():
        remove_leftovers(store.root)
    for path in reversed(list_checkpoints(store.root)):
        try:
            verify_directory(path)
        except UserError as error:
            store.report(f"{error}; trying an older checkpoint")
        else:
            return path
    return None


def load_snapshot(path: Path) -> Snapshot:
    """Read a verified checkpoint, tensors on the CPU."""
    trainer = json.loads((path / _TRAINER).read_text(encoding="utf-8"))
    if trainer.get("format") != FORMAT:
        raise UserError(f"{path} has format {trainer.get('format')}, this version reads {FORMAT}; update the project")
    optimizer: dict[str, Tensor] = {}
    if (path / _OPTIMIZER_INDEX).exists():
        index = json.loads((path / _OPTIMIZER_INDEX).read_text(encoding="utf-8"))
        for name in sorted(set(index.values())):
            optimizer |= safetensors.torch.load_file(path / name)
    average = safetensors.torch.load_file(path / _AVERAGE) if (path / _AVERAGE).exists() else {}
    return Snapshot(trainer, safetensors.torch.load_file(path / _MODEL), optimizer, average)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        safetensors.torch.save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # how the library reports a full disk, too
        raise OSError(str(error)) from error


def _update_links(root: Path, latest: Path, best_step: int | None) -> None:
    targets = {"latest": latest.name}
    if best_step is not None and (root / f"step-{best_step:08d}").is_dir():
        targets["best"] = f"step-{best_step:08d}"
    for name, target in targets.items():
        temporary = root / f".{name}.tmp-link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(root / name)


def _prune(store: CheckpointStore, newest: int, best: int | None) -> None:
    """Delete what retention does not keep; renamed first, so that a kill never leaves half a checkpoint."""
    steps = [checkpoint_step(p) for p in list_checkpoints(store.root) if checkpoint_step(p) <= newest]
    kept = {*steps[-store.spec.keep_last :], best}
    if store.spec.keep_every:
        kept |= {step for step in steps if step % store.spec.keep_every == 0}
    for step in steps:
        if step not in kept:
            path = store.root / f"step-{step:08d}"
            path.rename(store.root / f".{path.name}.tmp-pruned")
    remove_leftovers(store.root)
