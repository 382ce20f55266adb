"""Validation sets, and how a run scores them: every document once, each rank its share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import nn

from config.schemas import TrainConfig
from trainkit.data.megatron import IndexedTokens, IntArray
from trainkit.distribution import World, gather_over_ranks
from trainkit.precision import autocast_context
from transformerlm.evaluation.methods import score
from transformerlm.inference.predictor import Predictor
from transformerlm.models.transformer import Transformer
from transformerlm.objectives.build import reading_of
from transformerlm.tokenizer.tokenizer import Tokenizer

MAIN = "val"
"""The set that decides which checkpoint is the best; its values carry no name."""
TEST = "test"
"""The set that no run reads."""
DOCUMENTS_AT_ONCE = 64


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
    reading = reading_of(config.objective)

    def sums(model: nn.Module, portion: Portion) -> tuple[float, int, int]:
        assert isinstance(model, Transformer)
        predictor = Predictor(model, tokenizer, reading)
        # The seed makes the noise of a bound another one in each portion.
        scores = score(predictor, portion.documents, config.evaluation, seed=portion.first).scores
        return math.fsum(scores.nats), int(scores.tokens.sum()), int(scores.bytes.sum())

    def measure(model: nn.Module, share: Sequence[Portion]) -> dict[str, float]:
        parts = gather_over_ranks([sums(model, portion) for portion in share], world)
        nats, tokens, size = zip(*(one for part in parts for one in part), strict=True)
        total = math.fsum(nats)  # exact: it does not matter in which order the ranks' parts come
        loss = total / max(sum(tokens), 1)
        values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        return values | ({"val_bits_per_byte": total / math.log(2) / sum(size)} if sum(size) else {})

    def evaluate(model: nn.Module, step: int) -> Mapping[str, float]:
        del step
        values: dict[str, float] = {}
        with autocast_context(config.training.precision, world.device):
            for name, share in shares.items():
                suffix = "" if name == MAIN else f"/{name}"
                values |= {f"{metric}{suffix}": value for metric, value in measure(model, share).items()}
        return values

    return evaluate


class Portion(NamedTuple):
    """Documents `first`, … of a set."""

    first: int
    documents: Iterable[IntArray]


def _share(held_out: HeldOut, limit: int, world: World) -> list[Portion]:
    """This rank's documents, tokenised here, once.

    In portions that are the same for any number of ranks: which documents share a row changes the last bits of a score.
    """
    count = min(len(held_out), limit or len(held_out))
    starts = range(0, count, DOCUMENTS_AT_ONCE)[world.rank :: world.size]
    return [Portion(first, held_out.documents(first, min(first + DOCUMENTS_AT_ONCE, count))) for first in starts]
