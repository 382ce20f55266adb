"""Whether the checkpoints of a run will fit on their disk, asked before the first step and not after a night."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from trainkit.checkpoints import CheckpointStore, list_checkpoints, model_tensors
from trainkit.errors import UserError
from trainkit.remote import open_remote


def estimate_checkpoint_bytes(model: nn.Module, average: Mapping[str, Tensor]) -> int:
    """Weights, averages, and the two 32-bit numbers that Adam keeps for each trained parameter."""
    tensors = [*model_tensors(model).values(), *average.values()]
    optimizer = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
    return sum(t.numel() * t.element_size() for t in tensors) + optimizer


def check_checkpoint_places(store: CheckpointStore, checkpoint_bytes: int) -> str | None:
    """Raises `UserError` when not even one more checkpoint fits; returns a warning when retention's share does not."""
    if store.spec.remote:
        open_remote(store.spec.remote)  # refuses what no package can open
    place = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < checkpoint_bytes:
        raise UserError(
            f"a checkpoint of this run takes about {_size(checkpoint_bytes)}, but {place} has {_size(free)} left; free "
            "some space, choose another run.dir, or set checkpoint.save_optimizer = false"
        )
    # The newest ones, the best, and the one that is being written beside them.
    copies = store.spec.keep_last + 2
    reusable = sum(_bytes_of(path) for path in list_checkpoints(store.root))
    if free + reusable < copies * checkpoint_bytes:
        return (
            f"the disk may become full: checkpoint.keep_last = {store.spec.keep_last} means up to {copies} checkpoints "
            f"of about {_size(checkpoint_bytes)}, and {place} has {_size(free + reusable)} for them; training would go "
            "on, without the newest checkpoints"
        )
    return None


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
