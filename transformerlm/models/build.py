"""From a spec to a model."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from trainkit.random import Purpose, derive_seed, normal
from transformerlm.models.specs import ModelSpec, TransformerSpec
from transformerlm.models.transformer import Transformer

_CHUNK = 1 << 20
"""Numbers drawn at one time: counter-based generation needs some 64-bit scratch per number."""


def create_model(
    spec: ModelSpec, *, vocab_size: int, seed: int = 0, device: torch.device | str | None = None
) -> Transformer:
    """An initialised model for a tokenizer of `vocab_size` ids, float32, on `device` (default: PyTorch's).

    Each parameter's values are a function of `seed` and its name, whatever else the model holds. On the `meta` device
    there are no values: that is for counting.
    """
    model = empty_model(spec, vocab_size=vocab_size, device=device)
    if not model.embedding.weight.is_meta:
        initialize(model, seed)
    return model


def empty_model(spec: ModelSpec, *, vocab_size: int, device: torch.device | str | None = None) -> Transformer:
    """The model with matrices that hold nothing yet."""
    with torch.device(device) if device is not None else nullcontext():
        match spec:
            case TransformerSpec():
                return Transformer(spec, vocab_size=vocab_size)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill the parameters: gains with one, matrices with normal numbers, the padding of the vocabulary with zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            _fill_normal(parameter, model.init_std(name), derive_seed(seed, name))
    for table in [model.embedding, model.output]:
        if table is not None:
            table.weight[model.vocab_size :] = 0.0


def _fill_normal(parameter: Tensor, std: float, seed: int) -> None:
    if std == 0.0:
        parameter.zero_()
        return
    rows_at_once = max(1, _CHUNK // parameter.shape[1])
    for start in range(0, parameter.shape[0], rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, parameter.shape[0]), device=parameter.device)
        parameter[start : start + len(rows)] = std * normal(seed, Purpose.INIT, rows, parameter.shape[1])
