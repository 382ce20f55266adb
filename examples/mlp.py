"""An MLP on numbers, trained with `trainkit` alone: `uv run python examples/mlp.py [FOLDER]`.

Run it again after Ctrl-C (or `kill -9`): it goes on where it was saved last.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.checkpoints import CheckpointStore, find_newest_intact, load_snapshot
from trainkit.distribution import open_world
from trainkit.interrupts import catch_interrupts
from trainkit.logging.run_log import open_run_log
from trainkit.loop import Run, train
from trainkit.random import Purpose, normal
from trainkit.specs import AdamWSpec, CheckpointSpec, CosineScheduleSpec, LoggingSpec, TrainingSpec
from trainkit.task import Batch, Loss

ROWS = 64
TRAINING = TrainingSpec(
    max_steps=400, total_batch_size=ROWS, device_batch_size=ROWS, eval_every=100, save_every=100, device="cpu"
)


def rows(first: int, count: int) -> Batch:
    """Numbers x and y = sin(x0 + x1 + x2): each row a function of its number."""
    sample = torch.arange(first, first + count)
    x = normal(1, Purpose.CORPUS, sample, 3).float()
    return {"x": x, "y": x.sum(-1).sin(), "sample": sample, "valid": torch.ones(count, dtype=torch.bool)}


class Regression:
    """Squared error. What it counts is known before the forward pass, so that any accumulation gives one gradient."""

    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": batch["valid"].sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        squares = ((model(batch["x"]).squeeze(-1) - batch["y"]).square() * batch["valid"]).sum()
        return Loss(squares / denominators["loss"], {"loss": (squares.detach(), batch["valid"].sum())})


class Numbers:
    """A source says where it is after each step; a checkpoint keeps that, of every rank."""

    def steps(self, states: list[dict[str, Any]] | None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        first = states[0]["next"] if states else 0
        while True:
            yield [rows(first, ROWS)], {"next": first + ROWS}
            first += ROWS


def evaluate(model: nn.Module, step: int) -> dict[str, float]:
    held_out = rows(10_000_000, 1000)
    with torch.no_grad():
        return {"val_loss": (model(held_out["x"]).squeeze(-1) - held_out["y"]).square().mean().item()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    store = CheckpointStore(folder / "checkpoints", CheckpointSpec())
    newest = find_newest_intact(store)
    snapshot = load_snapshot(newest) if newest else None
    offset = snapshot.trainer["log_offset"] if snapshot else 0
    with (
        open_world(TRAINING) as world,
        catch_interrupts() as interrupts,
        closing(open_run_log(folder, LoggingSpec(), total_steps=TRAINING.max_steps, continue_at=offset)) as log,
    ):
        run = Run(
            model=nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1)),
            task=Regression(),
            source=Numbers(),
            training=TRAINING,
            optimizer=AdamWSpec(learning_rate=1e-2),
            schedule=CosineScheduleSpec(warmup_steps=10),
            world=world,
            log=log,
            checkpoints=store,
            evaluate=evaluate,
            stop_requested=lambda: interrupts.requested,
        )
        result = train(run, resume=snapshot)
        log.message(f"{result.status} at step {result.step}; see {folder}/plots", result.step)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/mlp"))
