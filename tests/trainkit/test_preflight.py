"""The estimate before the first step: right about what can be counted, and without a trace in the run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.trainkit.ranks import alone
from tests.trainkit.toys import TOYS, make_rows
from trainkit.preflight import describe, estimate_run, format_duration
from trainkit.replicas import replicate
from trainkit.task import RunFacts


@pytest.mark.parametrize("toy", TOYS)
def test_it_counts_and_leaves_nothing_behind(toy: str) -> None:
    build, task = TOYS[toy]
    model, batch = build(), make_rows(torch.arange(5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    estimate = estimate_run(
        replicate(model, alone()), task, [batch, batch], alone(), steps=10, units_per_step=7, autocast=nullcontext
    )
    assert estimate.parameters == sum(p.numel() for p in before.values())
    assert estimate.units == 70 and estimate.memory_bytes > 0 and estimate.seconds > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])
    text = describe(estimate, RunFacts("rows"), alone())
    assert "· 70 rows to go" in text and "on cpu" in text


def test_a_batch_in_which_nothing_counts_does_not_divide_by_zero() -> None:
    build, task = TOYS["language"]
    batch = {**make_rows(torch.arange(3)), "valid": torch.zeros(3, dtype=torch.bool)}
    estimate = estimate_run(
        replicate(build(), alone()), task, [batch], alone(), steps=1, units_per_step=1, autocast=nullcontext
    )
    assert estimate.seconds > 0


def test_durations_read_as_people_say_them() -> None:
    assert [format_duration(s) for s in (5, 600, 3 * 3600, 5 * 86400)] == ["5 s", "10 min", "3.0 h", "5.0 days"]
