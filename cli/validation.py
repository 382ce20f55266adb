"""Validation sets, and how a run scores them: every document once, each rank its share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn

from config.schemas import TrainConfig
from trainkit.data.megatron import IndexedTokens, IntArray
from trainkit.distribution import World, sum_over_ranks, widest_float
from trainkit.precision import autocast_context
from transformerlm.evaluation.likelihood import score_documents
from transformerlm.tokenizer.tokenizer import Tokenizer

MAIN = "val"
"""The set that decides which checkpoint is the best; its values carry no name."""
TEST = "test"
"""The set that no run reads."""


class HeldOut(Protocol):
    """Documents to score."""

    @property
    def about(self) -> str:
        """What messages call them."""
        ...

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def documents(self, first: int, last: int) -> Iterable[IntArray]:
        """The ids of documents `first` … `last` − 1, each with the token that ends it; may be read again."""
        ...


@dataclass(frozen=True)
class HeldOutTokens:
    """The documents of token files."""

    tokens: IndexedTokens

    @property
    def about(self) -> str:
        return str(self.tokens.prefix)

    @property
    def identity(self) -> str:
        return self.tokens.identity

    def __len__(self) -> int:
        return len(self.tokens)

    def documents(self, first: int, last: int) -> Iterable[IntArray]:
        return _Slice(self.tokens, first, last)


@dataclass(frozen=True)
class _Slice:
    tokens: IndexedTokens
    first: int
    last: int

    def __iter__(self) -> Iterator[IntArray]:
        return (self.tokens.document(index) for index in range(self.first, self.last))


@dataclass(frozen=True)
class HeldOutTexts:
    """Texts that were read already."""

    about: str
    texts: Sequence[str]
    tokenizer: Tokenizer

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def documents(self, first: int, last: int) -> Iterable[IntArray]:
        return [encode_document(text, self.tokenizer) for text in self.texts[first:last]]


def encode_document(text: str, tokenizer: Tokenizer) -> IntArray:
    """The ids of a text and the end of text; special tokens in a text are plain characters, as in training."""
    return np.append(tokenizer.encode(text, allowed_special="none"), np.array(tokenizer.eot_id, tokenizer.dtype))


def build_evaluator(
    config: TrainConfig, tokenizer: Tokenizer, sets: Mapping[str, HeldOut], world: World
) -> Callable[[nn.Module, int], Mapping[str, float]] | None:
    """Scores all sets by name: nats per token, perplexity, bits per byte; None where there is no set.

    The main set's values are `val_loss` and so on, those of a set `wiki` are `val_loss/wiki`.
    """
    if not sets:
        return None
    shares = {name: _share(held_out, config.evaluation.max_documents, world) for name, held_out in sets.items()}
    byte_lengths = tokenizer.byte_lengths()

    def score(model: nn.Module, documents: Iterable[IntArray]) -> Mapping[str, float]:
        scores = score_documents(
            model,
            documents,
            byte_lengths,
            eot_id=tokenizer.eot_id,
            context_length=config.model.context_length,
            stride=config.evaluation.stride,
            batch_size=config.evaluation.batch_size,
        )
        parts = {"nats": scores.nats.sum(), "tokens": scores.tokens.sum(), "bytes": scores.bytes.sum()}
        wide = partial(torch.tensor, dtype=widest_float(world.device), device=world.device)
        sums = sum_over_ranks({name: wide(value) for name, value in parts.items()}, world)
        nats, count, size = (float(sums[name]) for name in parts)
        loss = nats / max(count, 1)
        values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        return values | ({"val_bits_per_byte": nats / math.log(2) / size} if size else {})

    def evaluate(model: nn.Module, step: int) -> Mapping[str, float]:
        del step
        values: dict[str, float] = {}
        with autocast_context(config.training.precision, world.device):
            for name, documents in shares.items():
                suffix = "" if name == MAIN else f"/{name}"
                values |= {f"{metric}{suffix}": value for metric, value in score(model, documents).items()}
        return values

    return evaluate


def _share(held_out: HeldOut, limit: int, world: World) -> Iterable[IntArray]:
    """This rank's documents, tokenised here, once."""
    last = min(len(held_out), limit or len(held_out))
    return held_out.documents(last * world.rank // world.size, last * (world.rank + 1) // world.size)
