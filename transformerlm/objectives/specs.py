"""What a model is trained for, as frozen dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSpec:
    """Predict each token from the ones before it."""

    kind: Literal["ar"] = "ar"
    loss_chunk_size: Annotated[int, Ge(0)] = 0
    """Positions whose logits exist at one time: bounds the memory of large vocabularies; 0 = all of a micro-batch."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Weight of the squared log-partition function, which keeps logits from drifting (arXiv:2204.02311); 0 = off."""


ObjectiveSpec = AutoregressiveSpec
"""Grows into a union, told apart by `kind`."""
