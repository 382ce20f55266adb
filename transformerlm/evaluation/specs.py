"""How likelihood is measured, as a frozen dataclass that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

Method = Literal["auto", "ar", "bound", "left_to_right"]


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """Every token of a fixed set of documents, scored once. The result does not depend on `batch_size`."""

    method: Method = "auto"
    """`ar`: exactly, token after token. Of a diffusion model: `bound`, an upper bound averaged over the orders in which
    masks can be lifted, estimated; or `left_to_right`, that one order, exactly, a pass a token. `auto` is `ar` for what
    was trained for it, else `bound`."""
    draws: Annotated[int, Ge(1)] = 8
    """Noise levels at which `bound` looks at a window, times two, so that its error is known."""
    max_documents: Annotated[int, Ge(0)] = 0
    """Score only the first so many documents; 0 = all."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Rows of `context_length` positions in one forward pass."""
    stride: Annotated[int, Ge(0)] = 0
    """Tokens by which the window of `ar` moves over a document longer than the context; 0 = half of the context."""
