"""Estimates of a model's cost beside what PyTorch really keeps."""

from __future__ import annotations

import pytest
import torch

from transformerlm.models.build import create_model
from transformerlm.models.sizes import activation_bytes, block_activation_bytes, logit_bytes
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer

ROWS, LENGTH = 2, 32
TOKENS = ROWS * LENGTH


def spec(num_layers: int, *, qk_norm: bool) -> TransformerSpec:
    return TransformerSpec(
        context_length=LENGTH, num_layers=num_layers, d_model=48, num_heads=6, num_kv_heads=2, d_ff=80, qk_norm=qk_norm
    )


def kept_bytes(model: Transformer, precision: torch.dtype | None) -> int:
    """Of all that the forward pass keeps for the backward pass, parameters aside, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(TOKENS).view(ROWS, LENGTH)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None),
    ):
        model(tokens, readout=lambda hidden, _: hidden.sum())
    return sum(kept.values())


def bytes_of_a_block(*, qk_norm: bool, precision: torch.dtype | None, recompute: bool = False) -> float:
    """What one more block makes of a difference."""
    kept: list[int] = []
    for layers in (2, 4):
        model = create_model(spec(layers, qk_norm=qk_norm), vocab_size=300)
        if recompute:
            model.recompute_blocks()
        kept.append(kept_bytes(model, precision))
    return (kept[1] - kept[0]) / 2


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("precision", "value_bytes"), [(None, 4), (torch.bfloat16, 2)])
def test_activations_of_a_block_are_what_is_kept(
    qk_norm: bool, precision: torch.dtype | None, value_bytes: int
) -> None:
    shape = spec(1, qk_norm=qk_norm)
    d, k = shape.d_model, shape.kv_heads * shape.head_dim
    # The CPU's RMSNorm keeps what it has normalised as well; CUDA's is one kernel that does not.
    normalised = 4 * (2 * d + (d + k if qk_norm else 0))
    matrices = 0 if precision is None else 2 * (d * (d + 2 * k) + d * d + 3 * d * shape.ff_width)
    expected = TOKENS * (block_activation_bytes(shape, value_bytes) + normalised) + matrices
    assert bytes_of_a_block(qk_norm=qk_norm, precision=precision) == expected


def test_recomputation_keeps_the_stream_between_blocks() -> None:
    found = bytes_of_a_block(qk_norm=True, precision=torch.bfloat16, recompute=True)
    few, many = (
        activation_bytes(spec(n, qk_norm=True), rows=ROWS, value_bytes=2, recompute=True) for n in (2, 4)
    )  # fmt: skip
    assert found == (many - few) / 2 == TOKENS * 4 * 48


def test_logits_are_padded_and_bounded_by_the_chunk() -> None:
    shape = spec(1, qk_norm=False)
    whole = logit_bytes(shape, 300, rows=ROWS, chunk_size=0)
    assert whole == 14 * TOKENS * 384 == logit_bytes(shape, 300, rows=ROWS, chunk_size=10**6)
    assert logit_bytes(shape, 300, rows=ROWS, chunk_size=8) == whole * 8 // TOKENS
