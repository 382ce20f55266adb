"""Where a run begins: at its own newest checkpoint, here or remote; at that of another run; or at weights alone.

A run that has a checkpoint goes on from it, whatever else its settings say: so the same command, repeated by a batch
system, begins once and continues ever after.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainkit.artifacts import verify_directory
from trainkit.checkpoints import (
    CheckpointStore,
    Snapshot,
    checkpoint_step,
    find_newest_intact,
    list_checkpoints,
    load_snapshot,
    newest_intact,
)
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.remote import fetch_newest, open_remote
from trainkit.specs import CheckpointSpec

NEW_HORIZON_FLAG = "--new-horizon"


@dataclass(frozen=True)
class Beginning:
    """Which checkpoint, and what of it. Plain enough to be sent to other ranks, each of which loads it."""

    kind: Literal["nothing", "own", "other run", "weights"] = "nothing"
    path: Path = Path()

    def __str__(self) -> str:
        match self.kind:
            case "nothing":
                return "starting from the first step"
            case "own":
                return f"resuming from {self.path}"
            case "other run":
                return f"going on from {self.path} of another run"
            case "weights":
                return f"beginning with the weights of {self.path}"


def choose_beginning(store: CheckpointStore) -> Beginning:
    """Find and verify it; the first rank calls this. Raises `UserError` for a place that holds no checkpoint."""
    own = find_newest_intact(store) or _fetched(store)
    return Beginning("own", own) if own is not None else first_beginning(store)


def first_beginning(store: CheckpointStore) -> Beginning:
    """Where a run begins that has no checkpoint of its own yet."""
    spec = store.spec
    check_beginning(spec)
    if spec.resume_from:
        return Beginning("other run", resolve_checkpoint(spec.resume_from, store.report))
    if spec.init_from:
        return Beginning("weights", resolve_checkpoint(spec.init_from, store.report))
    return Beginning()


def check_beginning(spec: CheckpointSpec) -> None:
    """Refuse to begin with another run that does not exist."""
    for name, place in (("resume_from", spec.resume_from), ("init_from", spec.init_from)):
        if place and not _folder(place).exists():
            raise UserError(
                f'checkpoint.{name} = "{place}" does not exist; train that run first, or name the folder of another '
                "run or of one of its steps"
            )


def load_beginning(
    beginning: Beginning, store: CheckpointStore, *, max_steps: int, new_horizon: bool
) -> Snapshot | None:
    """What `train` resumes from. Of another run's checkpoint its best and its log stay behind.

    Weights alone are no state to resume: `trainkit.checkpoints.load_weights` has them.
    """
    match beginning.kind:
        case "own":
            return load_snapshot(beginning.path)
        case "other run":
            found = load_snapshot(beginning.path)
            if found.trainer["max_steps"] != max_steps and not new_horizon:
                raise UserError(
                    f"{beginning.path} is of a run over {found.trainer['max_steps']} steps, and training.max_steps = "
                    f"{max_steps} would change its learning rates; add {NEW_HORIZON_FLAG} if that is meant",
                    EXIT_USAGE,
                )
            if found.trainer["step"] >= max_steps:
                raise UserError(
                    f"{beginning.path} is at the end of training.max_steps = {max_steps}: nothing is left to train; "
                    f"raise that and add {NEW_HORIZON_FLAG}, or begin with its weights alone by checkpoint.init_from",
                    EXIT_USAGE,
                )
            found = replace(found, trainer={**found.trainer, "best": {}, "log_offset": 0})
            if not store.spec.resume_optimizer:
                found = replace(found, optimizer={}, starts_optimizer_anew=True)
            return found
        case "nothing" | "weights":
            return None


def resolve_checkpoint(place: str, report: Callable[[str], None]) -> Path:
    """The verified checkpoint that `place` means: a step folder, a run folder, or `latest` or `best` of one.

    The links are not trusted: the newest intact checkpoint is found anew, and the best is the one that it names.
    """
    path, root = Path(place), _folder(place)
    root = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    if path.name not in ("latest", "best") and not list_checkpoints(root):
        verify_directory(path)
        return path
    newest = newest_intact(root, report)
    if newest is None:
        raise UserError(f"{place} holds no intact checkpoint; name a step folder or a run folder that has one")
    if path.name != "best":
        return newest
    best = json.loads((newest / "trainer.json").read_text(encoding="utf-8")).get("best", {}).get("step")
    found = next((p for p in list_checkpoints(root) if checkpoint_step(p) == best), None)
    if found is None:
        raise UserError(f"{place} does not exist: the run has no best checkpoint; name another")
    verify_directory(found)
    return found


def _folder(place: str) -> Path:
    """Of a run or a step; `latest` and `best` of one are links, which need not exist."""
    path = Path(place)
    return path.parent if path.name in ("latest", "best") else path


def _fetched(store: CheckpointStore) -> Path | None:
    if not store.spec.remote:
        return None
    path, problems = fetch_newest(open_remote(store.spec.remote), store.root)
    for problem in problems:
        store.report(problem)
    if path is not None:
        store.report(f"fetched {path.name} from {store.spec.remote}")
    return path
