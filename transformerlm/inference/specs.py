"""How text is generated, as frozen dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

WeightsName = Literal["raw", "ema"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
ModeName = Literal["auto", "ar", "diffusion"]


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """From logits to a token. The defaults sample from the model's own distribution."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter; 0 always takes the most likely token."""
    top_k: Annotated[int, Ge(0)] = 0
    """Keep the k most likely tokens; 0 = all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this (arXiv:1904.09751); 1 = all."""
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Drop tokens less likely than this share of the most likely one (arXiv:2407.01082); 0 = none."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Divides positive and multiplies negative logits of tokens already in the text (arXiv:1909.05858); 1 = off."""


DEFAULT_SAMPLING = SamplingSpec()

UnmaskingOrder = Literal["confidence", "margin", "entropy", "random", "first_hitting", "left_to_right"]
DenoisingCache = Literal["off", "prefix", "dual"]


@dataclass(frozen=True, kw_only=True)
class DenoisingSpec:
    """How a diffusion model fills its canvas: which places first, and how many at a time."""

    order: UnmaskingOrder = "confidence"
    """Which masked places come first: where the most likely token is most likely (`confidence`), furthest ahead of the
    second (`margin`), or the distribution is narrowest (`entropy`); at `random`; at random times as the noise process
    itself would (`first_hitting`, arXiv:2409.02908); or from `left_to_right`."""
    steps: Literal["off"] | Annotated[int, Ge(1)] = "off"
    """Forward passes over a text, at most, and one for each block at least; `off` = as `tokens_per_step` says."""
    tokens_per_step: Annotated[int, Ge(1)] = 1
    """Places filled in one pass when `steps` is off. One is exact; more treat them as independent, which is faster."""
    threshold: Annotated[float, Ge(0), Le(1)] = 0.0
    """Also fill every place whose most likely token has at least this probability (arXiv:2505.22618); 0 = off."""
    agreement: Annotated[float, Ge(0), Le(1)] = 0.0
    """Fill, from left to right, all places whose drafts have at least this probability as next tokens, of a model that
    was trained for both (arXiv:2506.00413); 0 = off."""
    block_length: Annotated[int, Ge(0)] = 0
    """Fill the canvas block after block of so many tokens; 0 = all at once, or a block model's own blocks."""
    guidance: Annotated[float, Ge(0)] = 0.0
    """Strength of classifier-free guidance: how far to move from what the model would write without the prompt."""
    cache: DenoisingCache = "off"
    """Keys and values kept while a block is filled, an approximation for a model without blocks (arXiv:2505.22618): of
    the text before it (`prefix`), or also of what comes after (`dual`). Block models have an exact cache, always."""

    def __post_init__(self) -> None:
        if self.steps != "off" and self.tokens_per_step != 1:
            raise ValueError("steps and tokens_per_step both say how fast to go: set one of them")
        pace = (self.order, self.steps, self.tokens_per_step, self.threshold)
        if self.agreement and pace != ("left_to_right", "off", 1, 0):
            raise ValueError(
                "agreement says itself how many places to fill, from left to right: set order = 'left_to_right', "
                "and neither steps, tokens_per_step nor threshold"
            )
        if self.cache != "off" and not self.block_length:
            raise ValueError(f"cache = '{self.cache}' keeps what lies outside of a block: set block_length")


DEFAULT_DENOISING = DenoisingSpec()


@dataclass(frozen=True, kw_only=True)
class InferenceSpec(SamplingSpec, DenoisingSpec):
    """One call of the predictor."""

    checkpoint: str = ""
    """A checkpoint: its step folder, its run folder, or `…/checkpoints/best` or `latest`."""
    prompt: str = ""
    """Text to continue; empty starts a new document."""
    suffix: str = ""
    """Text that follows what is to be written: a diffusion model fills in what lies between."""
    mode: ModeName = "auto"
    """How to write: `ar` token after token, `diffusion` by filling in masks; `auto` is what the model was trained for,
    `ar` when both."""
    total_length: Annotated[int, Ge(0)] = 0
    """Tokens of prompt, new text and suffix together; 0 = all that the model's context holds, which only a block
    diffusion model can go beyond."""
    num_samples: Annotated[int, Ge(1)] = 1
    """Continuations of the prompt, each with random numbers of its own."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the random numbers: the same seed gives the same text."""
    weights: WeightsName = "raw"
    """`raw`: the trained weights; `ema`: their running average, where the run kept one."""
    device: str = "auto"
    """`auto` takes CUDA where it exists, else the CPU; or a device name such as `cpu`, `cuda`, `cuda:1`, `mps`."""
    precision: PrecisionName = "fp32"
    """Type of weights and arithmetic; sampling itself is always in 64-bit floats."""
    stop_at_eot: bool = True
    """End a continuation where the model ends the document."""
