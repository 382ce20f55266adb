"""Settings of the data pipelines. Told apart by `pipeline_mode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class MegatronDataSpec:
    """Token files in Megatron-LM's `.bin`/`.idx` layout, read as windows straight from the memory map."""

    pipeline_mode: Literal["megatron"] = "megatron"
    megatron_train_prefix: str = ""
    """Path of the training files without `.bin`/`.idx`."""
    megatron_val_prefix: str = ""
    """Path of the validation files without `.bin`/`.idx`; empty = no validation set."""
    prefetch: Annotated[int, Ge(0)] = 2
    """Steps that a background thread prepares ahead; 0 reads in the training thread. Does not change the samples."""
