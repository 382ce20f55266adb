"""Which checkpoints stay: the newest ones, every n-th, the best; called when the newest has been read back intact."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from trainkit import artifacts
from trainkit.artifacts import TEMPORARY_MARK, fsync_directory, remove_leftovers
from trainkit.specs import CheckpointSpec


def steps_to_keep(spec: CheckpointSpec, steps: Collection[int], *, newest: int, best: int | None) -> set[int]:
    """Those of `steps` that retention leaves alone.

    Later than `newest` are checkpoints of an attempt that this one is overtaking; they go when it reaches them.
    """
    seen = sorted(step for step in steps if step <= newest)
    kept = {step for step in steps if step > newest or step == best} | set(seen[-spec.keep_last :])
    return kept | {step for step in seen if spec.keep_every and step % spec.keep_every == 0}


def apply_retention(root: Path, spec: CheckpointSpec, steps: Collection[int], *, newest: int, best: int | None) -> None:
    """Point the links to the newest and the best step, and delete what is not kept."""
    _link(root, "latest", newest)
    if best is not None and best in steps:
        _link(root, "best", best)
    else:  # it could not be written: the one that was the best before it stays
        best = _linked(root, "best")
    _delete(root, set(steps) - steps_to_keep(spec, steps, newest=newest, best=best))


def _link(root: Path, name: str, step: int) -> None:
    temporary = root / f".{name}{TEMPORARY_MARK}link"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"step-{step:08d}")
    temporary.replace(root / name)


def _linked(root: Path, name: str) -> int | None:
    link = root / name
    digits = link.readlink().name.removeprefix("step-") if link.is_symlink() else ""
    return int(digits) if digits.isdigit() else None


def _delete(root: Path, steps: Iterable[int]) -> None:
    """Renamed first, so that a kill never leaves half a checkpoint."""
    for step in sorted(steps):
        artifacts.step_hook("prune")
        path = root / f"step-{step:08d}"
        path.rename(root / f".{path.name}{TEMPORARY_MARK}pruned")
        fsync_directory(root)
    remove_leftovers(root)
