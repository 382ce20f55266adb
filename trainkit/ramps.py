"""Steps that grow: more samples, or longer windows, from given steps on. Pure functions of the step.

Neither changes the order of the data. A larger batch takes several of the source's steps at once, so that the source's
state after the last of them is the state of the run; shorter windows are the source's windows cut into equal parts
("sequence length warm-up", arXiv:2108.06084), so that a step sees the same text at any length. Resuming needs nothing
but the step, and any source will do.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainkit.errors import EXIT_USAGE, UserError
from trainkit.specs import TrainingSpec
from trainkit.task import Batch

State = TypeVar("State")


def value_at(ramp: Sequence[tuple[int, int]], step: int) -> int:
    """The value of the last (step, value) pair that is not after `step` (0-based); 1 before the first."""
    return next((value for start, value in reversed(ramp) if start <= step), 1)


def units_before(training: TrainingSpec, step: int) -> int:
    """Units (tokens, for a language model) that the first `step` steps train on."""
    changes = [start for start, _ in training.batch_size_factors if start < step]
    bounds = [0, *changes, step]
    factors = sum((end - start) * value_at(training.batch_size_factors, start) for start, end in pairwise(bounds))
    return factors * training.total_batch_size


def ramped(
    steps: Iterator[tuple[list[Batch], State]], training: TrainingSpec, start: int
) -> Generator[tuple[list[Batch], State]]:
    """The run's steps from `start` on, made of the source's."""
    step = start
    while True:
        taken = [next(steps) for _ in range(value_at(training.batch_size_factors, step))]
        parts = value_at(training.context_length_divisors, step)
        # First micro-batches first: so neighbours stay neighbours on any number of ranks (`trainkit.tree`).
        batches = [
            batch for same in zip_longest(*(batches for batches, _ in taken)) for batch in same if batch is not None
        ]
        yield [cut_windows(batch, parts) for batch in batches], taken[-1][1]
        step += 1


def cut_windows(batch: Batch, parts: int) -> Batch:
    """A batch of windows `tokens`, `documents` [rows, length + 1] as one of [rows · parts, length / parts + 1].

    Neighbours share a token, as the windows did: each target is still there once. Part p of sample g is sample
    g · parts + p; when the parts become fewer, numbers come again, for other text (what is drawn by number, too).
    """
    if parts == 1:
        return batch
    if "tokens" not in batch:
        raise UserError(
            "training.context_length_divisors cuts windows of text, and the batches of this run have no `tokens`; "
            "leave it out",
            EXIT_USAGE,
        )
    length = batch["tokens"].shape[1] - 1
    if length % parts:
        raise UserError(
            f"training.context_length_divisors has {parts}, which does not divide the context length {length}; "
            "choose divisors of it",
            EXIT_USAGE,
        )

    def cut(rows: Tensor) -> Tensor:
        return rows.unfold(1, length // parts + 1, length // parts).reshape(-1, length // parts + 1)

    documents = cut(batch["documents"])
    sample = (batch["sample"][:, None] * parts + torch.arange(parts)).flatten()
    changed: dict[str, Any] = {
        "tokens": cut(batch["tokens"]),
        "documents": torch.where(documents < 0, -1, documents - documents[:, :1].clamp(min=0)),
        "sample": sample,
        "valid": batch["valid"].repeat_interleave(parts),
    }
    return {**batch, **changed}
