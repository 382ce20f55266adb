"""Gradient checkpointing: less is kept, and not a bit changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer

SPEC = TransformerSpec(context_length=64, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, qk_norm=True)


def make(recompute: bool) -> Transformer:
    model = create_model(SPEC, vocab_size=300, seed=3)
    if recompute:
        model.recompute_blocks()
    return model


def loss(model: Transformer) -> Tensor:
    tokens = (torch.arange(2 * 65).view(2, 65) * 37) % 300
    segments = (torch.arange(64) >= 20).long().expand(2, 64)
    logits = model(tokens[:, :-1], segments=segments)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: Transformer) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: Transformer) -> int:
    """Of everything that the forward pass keeps for the backward pass, weights aside, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(kept.values())


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_gradients_are_equal_to_the_bit(precision: torch.dtype | None) -> None:
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        plain, again = gradients(make(False)), gradients(make(True))
    assert plain.keys() == again.keys() and len(plain) == len(dict(make(False).named_parameters()))
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_much_less_is_kept() -> None:
    """Of each block what enters it remains; the head and its loss, which are no block, keep what they kept."""
    plain, again = kept_bytes(make(False)), kept_bytes(make(True))
    head = 2 * 64 * 300 * 4
    assert again - head < 0.2 * (plain - head)


def test_nothing_is_recomputed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(True)
    monkeypatch.setattr("transformerlm.models.transformer.checkpoint", _refuse)
    with torch.no_grad():
        loss(model)
    with pytest.raises(AssertionError, match="recomputed"):
        loss(model)


def _refuse(function: Callable[..., Tensor], *arguments: object, **named: object) -> Tensor:
    raise AssertionError("recomputed")


@pytest.mark.slow
def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    plain, compiled = make(True), make(True)
    compiled.compile(fullgraph=True)
    expected = gradients(plain)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
