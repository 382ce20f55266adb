"""What a model costs, from its spec alone: nothing is built and nothing heavy is imported."""

from __future__ import annotations

from transformerlm.models.specs import ModelSpec, padded_vocabulary

LOGIT_BYTES = 14
"""Of one logit where its gradient is computed: log-probability, its gradient and that of the logit in 32 bits, and the
latter once more in 16."""


def flops_per_token(spec: ModelSpec, vocab_size: int) -> float:
    """Floating-point operations of one forward and backward pass, per token of a full context.

    Six per parameter that takes part in a matrix product (the head does, the embedding lookup does not), and
    12 · layers · d_model · context for attention scores and sums; as in PaLM's appendix B (arXiv:2204.02311) the
    causal half that is never needed counts too, so that utilisations compare.
    """
    attention = spec.d_model * (2 * spec.num_heads + 2 * spec.kv_heads) * spec.head_dim
    feed_forward = 3 * spec.d_model * spec.ff_width
    head = padded_vocabulary(vocab_size) * spec.d_model
    matrices = spec.num_layers * (attention + feed_forward) + head
    return 6.0 * matrices + 12.0 * spec.num_layers * spec.d_model * spec.context_length


def block_activation_bytes(spec: ModelSpec, value_bytes: int) -> int:
    """What one block keeps of one token for the backward pass, without `torch.compile` (which keeps less).

    `value_bytes` is 2 where matrices are multiplied in 16 bits, else 4; the residual stream has 4. With d channels, k
    of them in keys, and f in the feed-forward layer, a block keeps in these

        5 d + 3 k + 4 f     both norms' outputs (2 d), queries, keys and values as they come from their matrix
                            (d + 2 k), queries and keys turned by their position (d + k), what attention gives (d);
                            the two inputs of SwiGLU, the first one's SiLU, and their product (4 f)

    and in 32 bits the stream before each norm (2 d), a number per head of the softmax, one per norm, and with `qk_norm`
    one per head and, if they were in 16 bits, queries and keys before it (d + k). The scores are not kept: fused
    attention computes them again.
    """
    d, k, f = spec.d_model, spec.kv_heads * spec.head_dim, spec.ff_width
    singles = 2 * d + spec.num_heads + 2
    if spec.qk_norm:
        singles += spec.num_heads + spec.kv_heads + (d + k if value_bytes < 4 else 0)
    return value_bytes * (5 * d + 3 * k + 4 * f) + 4 * singles


def activation_bytes(spec: ModelSpec, *, rows: int, value_bytes: int, recompute: bool) -> int:
    """What all blocks keep of `rows` windows; with `recompute` (gradient checkpointing, arXiv:1604.06174) the stream
    between blocks, and all of one block."""
    tokens, block = rows * spec.context_length, block_activation_bytes(spec, value_bytes)
    if recompute:
        return tokens * (spec.num_layers * 4 * spec.d_model + block)
    return tokens * spec.num_layers * block


def logit_bytes(spec: ModelSpec, vocab_size: int, *, rows: int, chunk_size: int) -> int:
    """The loss of `rows` windows, `chunk_size` positions at a time (0 = all)."""
    positions = rows * spec.context_length
    return LOGIT_BYTES * min(chunk_size or positions, positions) * padded_vocabulary(vocab_size)
