"""What a model is, as frozen dataclasses that import nothing heavy. The vocabulary is the tokenizer's: not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

AttentionBackend = Literal["sdpa", "eager"]
RopeScaling = Literal["none", "linear", "ntk"]
Alignment = Literal["in_place", "shifted"]
"""Which token the logits at a place are about: the one there, or the one after it."""
Mode = Literal["ar", "diffusion"]

VOCABULARY_MULTIPLE = 128
"""Embedding tables are padded to a multiple of this: matrix kernels run fastest on such widths."""

FEED_FORWARD_MULTIPLE = 64
"""A derived feed-forward width is a multiple of this, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """The dense decoder: pre-norm RMSNorm, rotary positions, SwiGLU."""

    kind: Literal["transformer"] = "transformer"
    context_length: Annotated[int, Ge(1)] = 256
    """Positions that the model sees at once."""
    num_layers: Annotated[int, Ge(1)] = 4
    """Transformer blocks."""
    d_model: Annotated[int, Ge(1)] = 256
    """Width of the residual stream; a multiple of `num_heads`."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Query heads of each attention layer."""
    num_kv_heads: Annotated[int, Ge(0)] = 0
    """Key and value heads: 0 = as many as query heads, 1 = multi-query, between = grouped-query (arXiv:2305.13245)."""
    d_ff: Annotated[int, Ge(0)] = 0
    """Hidden width of the feed-forward layers; 0 = 8/3 · d_model, rounded up to a multiple of 64."""
    attention_backend: AttentionBackend = "sdpa"
    """`sdpa`: PyTorch's fused attention; `eager`: the same in plain tensor operations, to read and to check against."""
    document_mask: bool = True
    """Train with attention inside each document only; False lets it reach into the documents before."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too."""
    qk_norm: bool = False
    """Normalise queries and keys of each head before attention (arXiv:2302.05442)."""
    zero_init_output: bool = False
    """Start the last projection of each attention and feed-forward layer at zero: a block begins as the identity."""
    rope_theta: Annotated[float, Gt(1)] = 10000.0
    """Base of the rotary frequencies (arXiv:2104.09864)."""
    rope_scaling: RopeScaling = "none"
    """How to reach past the trained length: `linear` squeezes positions (arXiv:2306.15595), `ntk` raises the base."""
    rope_scaling_factor: Annotated[float, Ge(1)] = 1.0
    """How many times longer than trained the context becomes; needs a `rope_scaling` other than `none`."""
    noise_embedding: bool = False
    """Tell a diffusion model which share of the text is masked. It could count the masks itself: mostly not needed."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the mean square inside each RMSNorm."""

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads})")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}); "
                "0 means as many as num_heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"d_model / num_heads is {self.head_dim}, but rotary positions turn pairs of channels: make it even"
            )
        if self.rope_scaling == "none" and self.rope_scaling_factor != 1.0:
            raise ValueError("rope_scaling_factor has no effect while rope_scaling is 'none': choose 'linear' or 'ntk'")

    @property
    def head_dim(self) -> int:
        """Channels of each attention head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, the shorthand 0 resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def ff_width(self) -> int:
        """Hidden width of the feed-forward layers, the shorthand 0 resolved."""
        return self.d_ff or _round_up(-(-8 * self.d_model // 3), FEED_FORWARD_MULTIPLE)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the logits of a trained model are to be read: a property of the weights, recorded beside them."""

    modes: tuple[Mode, ...] = ("ar",)
    """What it was trained for: next tokens under causal attention, masked tokens under bidirectional, or both."""
    alignment: Alignment = "shifted"
    """Which logits speak about a masked token. Next tokens are always read shifted."""
    block_size: int = 0
    """Tokens of a block in block diffusion; 0 = none, every token sees every other."""


AUTOREGRESSIVE = Reading()

ModelSpec = TransformerSpec
"""Grows into a union, told apart by `kind`."""


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding table for a tokenizer of `vocab_size` ids."""
    return _round_up(vocab_size, VOCABULARY_MULTIPLE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
