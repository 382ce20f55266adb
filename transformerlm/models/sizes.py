"""What a model costs, from its spec alone: nothing is built and nothing heavy is imported."""

from __future__ import annotations

from transformerlm.models.specs import ModelSpec, padded_vocabulary


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
