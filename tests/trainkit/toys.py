"""Three small tasks that the kit must train without knowing them: they prove that its contracts are wide enough."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.distribution import World
from trainkit.random import Purpose, normal, random_bits
from trainkit.task import Batch, Loss, Task


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


class Regression:
    """An MLP on numbers: squared error, averaged over valid rows."""

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": batch["valid"].sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        error = (model(batch["x"]).squeeze(-1) - batch["y"]).square()
        total = (error * batch["valid"]).sum()
        return Loss(total / denominators["loss"], {"loss": (total.detach(), batch["valid"].sum())})


class TinyLanguageModel(nn.Module):
    """Embedding, one recurrent layer, a head that runs inside `forward` through the readout."""

    def __init__(self, vocab_size: int = 11, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, width)
        self.mixer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor, readout: Callable[[Tensor, nn.Module], Any]) -> Any:
        hidden, _ = self.mixer(self.embedding(tokens))
        return readout(hidden, self.head)


class NextToken:
    """A tiny autoregressive objective: only the rows and positions that count reach the head."""

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": self._counted(batch).sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        counted, targets = self._counted(batch), batch["tokens"][:, 1:]

        def readout(hidden: Tensor, head: nn.Module) -> Tensor:
            return F.cross_entropy(head(hidden[counted]), targets[counted], reduction="sum")

        nats = model(batch["tokens"][:, :-1], readout)
        return Loss(nats / denominators["tokens"], {"loss": (nats.detach(), counted.sum())})

    def _counted(self, batch: Batch) -> Tensor:
        """Padding (id 0) and invalid rows do not count, so that rows weigh differently."""
        return (batch["tokens"][:, 1:] != 0) & batch["valid"][:, None]


class TwoTerms(NextToken):
    """Next token plus a regression on even tokens only: two denominators that differ from batch to batch."""

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {**super().weights(batch), "even": self._even(batch).sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        first = super().loss(model, batch, denominators)
        even = self._even(batch)

        def readout(hidden: Tensor, head: nn.Module) -> Tensor:
            return (head(hidden[even]).square().mean(-1)).sum()

        total = model(batch["tokens"][:, :-1], readout)
        value = first.value + 0.5 * total / denominators["even"]
        return Loss(value, {**first.metrics, "even": (total.detach(), even.sum())})

    def _even(self, batch: Batch) -> Tensor:
        return self._counted(batch) & (batch["tokens"][:, :-1] % 2 == 0)


TOYS: dict[str, tuple[Callable[[], nn.Module], Task]] = {
    "mlp": (mlp, Regression()),
    "language": (TinyLanguageModel, NextToken()),
    "two-terms": (TinyLanguageModel, TwoTerms()),
}


def make_rows(sample: Tensor, dtype: torch.dtype = torch.float32) -> Batch:
    """Rows for any of the toys, each a pure function of its sample index; lengths differ from row to row."""
    x = normal(1, Purpose.CORPUS, sample, 3).to(dtype)
    start = random_bits(2, Purpose.CORPUS, sample, 1) % 10
    tokens = (start + 3 * torch.arange(9)) % 10 + 1
    lengths = 2 + random_bits(3, Purpose.CORPUS, sample, 1) % 8
    tokens = torch.where(torch.arange(9) < lengths, tokens, 0)
    valid = torch.ones(len(sample), dtype=torch.bool)
    return {"x": x, "y": x.sum(-1).sin(), "tokens": tokens, "sample": sample, "valid": valid}


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    """Split the rows of `batch` into micro-batches of the given sizes."""
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [{name: tensor[a:b] for name, tensor in batch.items()} for a, b in pairwise(bounds)]


def pad(batch: Batch, rows: int) -> Batch:
    """Fill up to `rows` rows with copies that do not count."""
    extra = rows - len(batch["valid"])
    padded = {name: torch.cat([tensor, tensor[:1].expand(extra, *tensor.shape[1:])]) for name, tensor in batch.items()}
    padded["valid"] = torch.cat([batch["valid"], torch.zeros(extra, dtype=torch.bool)])
    return padded


@dataclass(frozen=True)
class ToySource:
    """B rows a step, an even share for each rank, in micro-batches of `micro` rows."""

    world: World
    samples: int = 12
    micro: int = 4

    def steps(self, states: list[dict[str, Any]] | None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        start = states[0]["next_sample"] if states else 0
        while True:
            rank, size = self.world.rank, self.world.size
            mine = torch.arange(start + self.samples * rank // size, start + self.samples * (rank + 1) // size)
            yield (
                [pad(make_rows(part), self.micro) for part in mine.split(self.micro)],
                {"next_sample": start + self.samples},
            )
            start += self.samples
