"""What a model is trained for, as frozen dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from transformerlm.models.specs import Alignment


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSpec:
    """Predict each token from the ones before it."""

    kind: Literal["ar"] = "ar"
    loss_chunk_size: Annotated[int, Ge(0)] = 0
    """Positions whose logits exist at one time: bounds the memory of large vocabularies; 0 = all of a micro-batch."""
    z_loss: Annotated[float, Ge(0)] = 0.0
    """Weight of the squared log-partition function, which keeps logits from drifting (arXiv:2204.02311); 0 = off."""


MaskingSchedule = Literal["linear", "cosine", "polynomial", "clipped"]


@dataclass(frozen=True, kw_only=True)
class NoiseSpec:
    """How text is masked. What the schedules mean is told in `transformerlm.objectives.noise`."""

    schedule: MaskingSchedule = "linear"
    """Probability p(t) of a mask at time t: `linear` t, `cosine` cos(π(1 - t)/2), `polynomial` t^exponent, `clipped`
    from `mask_low` to `mask_high` only, which is no likelihood bound."""
    exponent: Annotated[float, Gt(0)] = 2.0
    """Of the polynomial schedule."""
    mask_low: Annotated[float, Ge(0), Le(1)] = 0.3
    """Smallest mask probability of the clipped schedule."""
    mask_high: Annotated[float, Ge(0), Le(1)] = 0.8
    """Largest mask probability of the clipped schedule."""
    document_mask: bool = False
    """Let a token see its own document only; attention then tells how long the document is."""
    random_length_fraction: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the windows cut to a random length, so that the model also knows short canvases (arXiv:2502.09992)."""

    def __post_init__(self) -> None:
        if self.schedule == "clipped" and self.mask_low >= self.mask_high:
            raise ValueError(f"mask_low ({self.mask_low}) must be below mask_high ({self.mask_high})")


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec(NoiseSpec):
    """Restore masked tokens from what is left of the text."""

    kind: Literal["diffusion"] = "diffusion"
    loss_chunk_size: Annotated[int, Ge(0)] = 0
    """Positions whose logits exist at one time: bounds the memory of large vocabularies; 0 = all of a micro-batch."""
    block_size: Annotated[int, Ge(0)] = 0
    """Tokens of a block: bidirectional inside, causal across (arXiv:2503.09573); 0 = the window is one block."""
    alignment: Alignment = "in_place"
    """Which logits speak about a masked token: those at its place, or (`shifted`) those one place before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size and self.alignment == "shifted":
            raise ValueError("block_size needs alignment 'in_place': a block's first token has no place before it")


@dataclass(frozen=True, kw_only=True)
class DualSpec(NoiseSpec):
    """Both at once: α · AR + (1 - α) · diffusion on the same windows, with one head (shifted alignment)."""

    kind: Literal["dual"] = "dual"
    loss_chunk_size: Annotated[int, Ge(0)] = 0
    """Positions whose logits exist at one time: bounds the memory of large vocabularies; 0 = all of a micro-batch."""
    ar_weight: Annotated[float, Ge(0), Le(1)] = 0.5
    """α at the first step."""
    final_ar_weight: Annotated[float, Ge(0), Le(1)] = 0.5
    """α at the last step; in between it moves linearly."""


ObjectiveSpec = AutoregressiveSpec | DiffusionSpec | DualSpec
