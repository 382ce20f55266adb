"""What a model costs, from its spec alone: nothing is built and nothing heavy is imported."""

from __future__ import annotations

from transformerlm.models.specs import ModelSpec, padded_vocabulary


def num_parameters(spec: ModelSpec, vocab_size: int, *, embeddings: bool = True) -> int:
    """Trainable parameters, padding of the vocabulary included; `embeddings=False` leaves out embedding and head."""
    table = padded_vocabulary(vocab_size) * spec.d_model
    tables = (1 if spec.tie_embeddings else 2) * table if embeddings else 0
    gains = (2 * spec.num_layers + 1) * spec.d_model + (2 * spec.num_layers * spec.head_dim if spec.qk_norm else 0)
    return tables + _matrix_parameters(spec) + gains


def flops_per_token(spec: ModelSpec, vocab_size: int) -> float:
    """Floating-point operations of one forward and backward pass, per token of a full context.

    Six per parameter that takes part in a matrix product (the head does, the embedding lookup does not), and
    12 · layers · d_model · context for attention scores and sums; as in PaLM's appendix B (arXiv:2204.02311) the
    causal half that is never needed counts too, so that utilisations compare.
    """
    matrices = _matrix_parameters(spec) + padded_vocabulary(vocab_size) * spec.d_model
    return 6.0 * matrices + 12.0 * spec.num_layers * spec.d_model * spec.context_length


def _matrix_parameters(spec: ModelSpec) -> int:
    attention = spec.d_model * (2 * spec.num_heads + 2 * spec.kv_heads) * spec.head_dim
    feed_forward = 3 * spec.d_model * spec.ff_width
    return spec.num_layers * (attention + feed_forward)
