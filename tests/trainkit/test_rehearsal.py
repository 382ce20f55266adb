"""The trial before a run: what it leaves behind (nothing), and how it says that something does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainkit.ranks import alone, run_on_ranks
from tests.trainkit.toys import Regression, make_rows, mlp
from trainkit.distribution import World
from trainkit.rehearsal import Rehearsal, rehearse
from trainkit.specs import AdamWSpec, DistributedSpec, TrainingSpec
from trainkit.task import Batch, Loss


class Greedy(Regression):
    """Wants, on one rank, more memory than any machine has."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        if self.rank == 1:
            torch.empty(1 << 56, dtype=torch.uint8)
        return super().loss(model, batch, denominators)


def attempt(world: World, task: Regression, **distributed: Any) -> Rehearsal:
    return rehearse(
        mlp,
        task,
        make_rows(torch.arange(4)),
        world,
        training=TrainingSpec(device="cpu"),
        optimizer=AdamWSpec(),
        distributed=DistributedSpec(**distributed),
    )


def test_a_small_model_fits() -> None:
    assert attempt(alone(), Regression()).fits_comfortably


def test_memory_that_is_refused_does_not_fit_and_other_errors_are_errors() -> None:
    assert not attempt(alone(), Greedy(rank=1)).fits

    class Broken(Regression):
        def weights(self, batch: Batch) -> Mapping[str, Tensor]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        attempt(alone(), Broken())


def test_all_ranks_hear_of_the_one_that_it_is_too_much_for(tmp_path: Path) -> None:
    assert run_on_ranks(2, _on_a_rank, tmp_path) == [(False, True)] * 2


def _on_a_rank(world: World) -> tuple[bool, bool]:
    return attempt(world, Greedy(world.rank)).fits, attempt(world, Regression(), strategy="zero1").fits


@pytest.mark.parametrize(
    ("needs", "has", "refused", "fits", "comfortably"),
    [
        (90, 100, False, True, True),
        (95, 100, False, True, False),
        (101, 100, False, False, False),
        (0, 0, False, True, True),
        (0, 100, True, False, False),
    ],
)
def test_numbers(needs: int, has: int, refused: bool, fits: bool, comfortably: bool) -> None:
    outcome = Rehearsal(needs, has, refused)
    assert (outcome.fits, outcome.fits_comfortably) == (fits, comfortably)
