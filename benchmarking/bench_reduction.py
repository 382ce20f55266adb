"""What the tree reducer costs: the gradient of a step on two gloo ranks, by the tree and by DDP, in turn.

    uv run python -m benchmarking.bench_reduction

Two sizes of a Transformer, one and four micro-batches a rank, one thread a rank. DDP runs twice in each turn: the
ratio of the two is what the machine adds by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.distribution import open_world
from trainkit.launch import launch
from trainkit.replicas import _data_parallel, replicate
from trainkit.specs import TrainingSpec
from trainkit.step import accumulate_gradients
from trainkit.task import Batch, Loss

SIZES = {"1M": (1024, 128, 4, 4), "17M": (8192, 384, 8, 2)}
"""Vocabulary, width, layers, rows of a micro-batch of 128 tokens each."""
SECONDS = 9.0


class Model(nn.Module):
    def __init__(self, vocab_size: int, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden @ self.table.weight.mT


class SameToken:
    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": torch.tensor(batch["tokens"].numel())}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        tokens = batch["tokens"]
        nats = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
        return Loss(nats / denominators["loss"], {"loss": (nats.detach(), torch.tensor(tokens.numel()))})


def measure(size: str, micro_batches: int) -> tuple[int, dict[str, float]]:
    """On each rank: the number of parameters, and the median seconds of a step's gradient each way."""
    vocab_size, width, layers, rows = SIZES[size]
    with open_world(TrainingSpec(device="cpu", threads=1)) as world:
        model = Model(vocab_size, width, layers)
        tree = replicate(model, world)
        ddp = _data_parallel(Model(vocab_size, width, layers), world)
        ways = {"tree": tree, "ddp": ddp, "ddp again": ddp}
        batches = [{"tokens": torch.randint(vocab_size, (rows, 128))} for _ in range(micro_batches)]
        times: dict[str, list[float]] = {name: [] for name in ways}
        goes_on, start = torch.ones(1), time.perf_counter()
        while goes_on.item():
            for name, replica in ways.items():
                dist.barrier()
                before = time.perf_counter()
                accumulate_gradients(replica, SameToken(), batches, world)
                times[name].append(time.perf_counter() - before)
            goes_on.fill_(time.perf_counter() - start < SECONDS or len(times["tree"]) < 2)
            dist.broadcast(goes_on, src=0)
        # The first turn pays for buffers and connections.
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        return sum(p.numel() for p in model.parameters()), medians


def main() -> None:
    for size in SIZES:
        for micro_batches in (1, 4):
            parameters, medians = launch(2, measure, size, micro_batches)
            tree, ddp, again = medians.values()
            print(
                f"{parameters / 1e6:5.1f}M, {micro_batches} micro-batches: tree {tree * 1e3:7.1f} ms, DDP "
                f"{ddp * 1e3:7.1f} ms, tree / DDP {tree / ddp:.2f}, DDP / DDP {again / ddp:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
