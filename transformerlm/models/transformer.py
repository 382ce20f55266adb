"""The dense Transformer: pre-norm RMSNorm, rotary positions, SwiGLU, one residual stream.

    hidden = embedding(tokens)
    hidden = hidden + attention(norm(hidden))         for each block
    hidden = hidden + feed_forward(norm(hidden))
    logits = head(norm(hidden))

The output head runs inside `forward`, through `readout`: a loss can compute logits piece by piece, or of chosen
positions only, while wrappers (DDP, FSDP, `torch.compile`) see one call from tokens to loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from profiling import nvtx
from transformerlm.models.attention import attention, attention_mask
from transformerlm.models.cache import KeyValueCache
from transformerlm.models.rope import Rope, rotate
from transformerlm.models.specs import TransformerSpec, padded_vocabulary

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [..., d_model] to logits [..., vocab_size], at least 32-bit."""

R = TypeVar("R")

NOISE_FEATURES = 128
"""Sines and cosines of a noise level."""


class Transformer(nn.Module):
    """Its matrices are empty: `create_model` makes one with initial weights, `load_model` one with trained ones."""

    def __init__(self, spec: TransformerSpec, *, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.vocab_size = vocab_size
        padded = padded_vocabulary(vocab_size)
        self.embedding = Embedding(padded, spec.d_model)
        self.noise_embedding = NoiseEmbedding(spec) if spec.noise_embedding else None
        self.rope = Rope(spec)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        # A table like the embedding, not a `Linear`: optimizers tell tables, which neither decay nor are orthogonalised
        # by Muon, by their module's type.
        self.output = None if spec.tie_embeddings else Embedding(padded, spec.d_model)

    @overload
    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        readout: None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        readout: Callable[[Tensor, Head], R],
    ) -> R: ...
    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        causal: bool = True,
        mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        readout: Callable[[Tensor, Head], Any] | None = None,
    ) -> Any:
        """Logits [batch, length, vocab_size], at least float32; or what `readout(hidden, head)` returns.

        `tokens` int64 [batch, length], ids below `vocab_size`. `segments` int64 [batch, length]: attention stays inside
        equal numbers. `positions` int64 [length] or [batch, length]: default 0, 1, … (after those in `cache`). With a
        `cache` the tokens continue what it holds, and it grows by them. `causal=False` lets every token see all;
        `mask` (bool, broadcasts to [batch, 1, length, keys]) says instead of `causal` which keys a query may see.
        `noise_level` float [batch, length] is the share of masks that a token shares its block with, for a model with
        `noise_embedding`; without it there are none. `readout` gets hidden [batch, length, d_model], the final norm
        applied.
        """
        length, start = tokens.shape[1], 0 if cache is None else cache.length
        key_segments = segments if cache is None or segments is None else cache.append_segments(segments)
        mask, is_causal = attention_mask(
            length=length,
            start=start,
            visible=mask,
            causal=causal,
            query_segments=segments,
            key_segments=key_segments,
            device=tokens.device,
        )
        cos, sin = self.rope(start, length, positions)
        context = Context(cos, sin, mask, is_causal, cache)
        hidden = self.embedding(tokens)
        if self.noise_embedding is not None:
            level = torch.zeros(tokens.shape, device=tokens.device) if noise_level is None else noise_level
            hidden = hidden + self.noise_embedding(level).to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, context)
        if cache is not None:
            cache.length += length
        hidden = self.norm(hidden)
        with nvtx.range("head", "fine"):
            return self.head(hidden) if readout is None else readout(hidden, self.head)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states; the table's padding is multiplied (its width is fast) and cut off."""
        table = self.embedding if self.output is None else self.output
        logits = F.linear(hidden, table.weight)[..., : self.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def recompute_blocks(self) -> None:
        """Train with less memory, for about a third more arithmetic, and the same bits."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recomputes = True

    def init_std(self, name: str) -> float:
        """Standard deviation that the matrix called `name` starts with.

        The last projection of each layer is scaled down, so that the residual stream does not grow with depth
        (GPT-2), or starts at zero.
        """
        if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
            return 0.0 if self.spec.zero_init_output else 0.02 / math.sqrt(2 * self.spec.num_layers)
        return 0.02

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue int64 [batch, length] (or [length]) by `max_new_tokens`, prompt included in the result.

        Options are the fields of `SamplingSpec` (`temperature`, `top_k`, `top_p`, …) and `seed`. The tokens are taken
        as they are: begin them with the tokenizer's end-of-text id, as every document in training began. For models
        trained for next tokens; a `transformerlm.inference.predictor.Predictor` knows what its checkpoint was for.
        """
        from transformerlm.inference.generation import extend

        return extend(self, tokens, max_new_tokens, **options)


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    is_causal: bool
    cache: KeyValueCache | None


class Block(nn.Module):
    recomputes = False
    """Whether the backward pass computes the block once more, so that the forward pass need not keep what is inside
    (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174). The same operations on the same numbers: no bit
    changes."""

    def __init__(self, spec: TransformerSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.feed_forward_norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.feed_forward = FeedForward(spec)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        # In here and not around the call, so that what wraps the block (FSDP) gathers its weights outside.
        if self.recomputes and torch.is_grad_enabled():
            recomputed = checkpoint(self._forward, hidden, context, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(recomputed, Tensor)
            return recomputed
        return self._forward(hidden, context)

    def _forward(self, hidden: Tensor, context: Context) -> Tensor:
        with nvtx.range("layer", "verbose"):
            with nvtx.range("attention", "fine"):
                hidden = hidden + self.attention(self.attention_norm(hidden), context)
            with nvtx.range("feed_forward", "fine"):
                return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class Attention(nn.Module):
    """Multi-head attention, keys and values shared by groups of heads where the spec says so."""

    def __init__(self, spec: TransformerSpec, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.qkv = Linear(spec.d_model, (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim, bias=False)
        self.query_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.key_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.output = Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        heads, kv_heads = self.spec.num_heads, self.spec.kv_heads
        qkv = self.qkv(x).unflatten(-1, (-1, self.spec.head_dim))
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            qk = torch.cat([self.query_norm(qk[:, :, :heads]), self.key_norm(qk[:, :, heads:])], dim=2)
        q, k = rotate(qk, context.cos, context.sin).split([heads, kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        with nvtx.range("mixing", "verbose"):
            mixed = attention(
                q, k, v, mask=context.mask, is_causal=context.is_causal, backend=self.spec.attention_backend
            )
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.gate_up = Linear(spec.d_model, 2 * spec.ff_width, bias=False)
        self.down = Linear(spec.ff_width, spec.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class NoiseEmbedding(nn.Module):
    """A vector for a share in [0, 1]: sines of many frequencies, then a small network (Peebles & Xie 2023,
    arXiv:2212.09748, condition on time like this)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.features = Linear(NOISE_FEATURES, spec.d_model, bias=False)
        self.output = Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, level: Tensor) -> Tensor:
        frequencies = torch.logspace(0, 3, NOISE_FEATURES // 2, device=level.device)
        angles = level.unsqueeze(-1).to(self.features.weight.dtype) * frequencies.to(self.features.weight.dtype)
        return self.output(F.silu(self.features(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class Linear(nn.Linear):
    """A matrix without values: PyTorch's own would be drawn from hidden state, only to be replaced."""

    def reset_parameters(self) -> None: ...


class Embedding(nn.Embedding):
    """The same for a table."""

    def reset_parameters(self) -> None: ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467), in at least 32 bits whatever the type of its input."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)
