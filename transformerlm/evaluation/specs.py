"""How likelihood is measured, as a frozen dataclass that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """Every token of a fixed set of documents, scored once. The result does not depend on `batch_size`."""

    max_documents: Annotated[int, Ge(0)] = 0
    """Score only the first so many documents; 0 = all."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Rows of `context_length` positions in one forward pass."""
    stride: Annotated[int, Ge(0)] = 0
    """Tokens by which the window moves over a document longer than the context; 0 = half the context length."""
