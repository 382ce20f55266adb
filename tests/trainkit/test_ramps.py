"""Batches and windows that grow: the same text in the same order, resumed to the bit."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.trainkit.ranks import alone
from tests.trainkit.test_loop import ListLog, make_run, newest, sha, stop_after
from tests.trainkit.toys import ToySource
from trainkit.errors import UserError
from trainkit.loop import Result, train
from trainkit.ramps import cut_windows, ramped, units_before, value_at
from trainkit.specs import TrainingSpec
from trainkit.task import Batch

FACTORS = ((0, 1), (3, 2), (7, 4))


def test_the_ramp_as_a_function_of_the_step() -> None:
    training = TrainingSpec(total_batch_size=10, batch_size_factors=FACTORS[1:])
    factors = [value_at(training.batch_size_factors, step) for step in range(9)]
    assert factors == [1, 1, 1, 2, 2, 2, 2, 4, 4]
    assert [units_before(training, step) for step in range(10)] == [10 * sum(factors[:step]) for step in range(10)]
    assert units_before(TrainingSpec(total_batch_size=10), 7) == 70
    with pytest.raises(ValueError, match="batch_size_factors names the steps"):
        TrainingSpec(batch_size_factors=((5, 2), (5, 4)))


@pytest.mark.parametrize("start", range(9))
def test_samples_come_in_order_whatever_step_one_starts_from(start: int) -> None:
    training = TrainingSpec(total_batch_size=12, batch_size_factors=FACTORS)
    states = [{"next_sample": units_before(training, start)}]
    for step, (batches, state) in enumerate(
        islice(ramped(ToySource(alone()).steps(states), training, start), 3), start
    ):
        samples = torch.cat([batch["sample"][batch["valid"]] for batch in batches])
        assert sorted(samples.tolist()) == list(range(units_before(training, step), units_before(training, step + 1)))
        assert state == {"next_sample": units_before(training, step + 1)}


def test_a_growing_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """However far a thread is ahead, and with the steps that its batches are prepared for."""
    training = {"max_steps": 10, "save_every": 4, "log_every": 3, "batch_size_factors": FACTORS}
    undisturbed, log = ListLog(), ListLog()
    prepared: set[tuple[int, int]] = set()

    def prepare(batch: Batch, step: int) -> Batch:
        prepared.update((step, sample) for sample in batch["sample"][batch["valid"]].tolist())
        return batch

    train(make_run(tmp_path / "a", undisturbed, training=training))
    result = Result("preempted", 0, {}, None)
    while result.status != "finished":
        snapshot = newest(tmp_path / "b")
        del log.records[snapshot.trainer["log_offset"] if snapshot else 0 :]
        changes = {"stop_requested": stop_after(2), "prepare": prepare, "prefetch": 3}
        result = train(make_run(tmp_path / "b", log, training=training, **changes), resume=snapshot)
    assert log.records == undisturbed.records and sha(tmp_path / "b") == sha(tmp_path / "a")
    assert newest(tmp_path / "a").trainer["samples"] == 12 * (3 + 4 * 2 + 3 * 4)
    bounds = [units_before(TrainingSpec(total_batch_size=12, batch_size_factors=FACTORS), step) for step in range(11)]
    wanted = {(step, sample) for step in range(10) for sample in range(bounds[step], bounds[step + 1])}
    assert {pair for pair in prepared if pair[0] < 10} == wanted
    assert [r["samples_seen"] for r in log.records if r["kind"] == "train"][:2] == [36, 12 * (3 + 3 * 2)]


def windows(rows: int, length: int) -> Batch:
    tokens = torch.arange(rows * (length + 1)).view(rows, -1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 1, -1, -1]])
    return {
        "tokens": tokens,
        "documents": documents,
        "sample": torch.tensor([5, 6]),
        "valid": torch.tensor([True, False]),
    }


def test_cut_windows_hold_every_target_once_and_documents_from_nought() -> None:
    batch = windows(2, 8)
    cut = cut_windows(batch, 4)
    assert cut["tokens"].shape == (8, 3) and cut["sample"].tolist() == [20, 21, 22, 23, 24, 25, 26, 27]
    assert torch.equal(cut["tokens"][:, :-1].flatten(), batch["tokens"][:, :-1].flatten())
    assert torch.equal(cut["tokens"][:, 1:].flatten(), batch["tokens"][:, 1:].flatten())
    assert cut["documents"].tolist()[:4] == [[0, 0, 0], [0, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert cut["documents"].tolist()[6:] == [[0, 0, 0], [0, -1, -1]]
    assert cut["valid"].tolist() == [True] * 4 + [False] * 4
    assert cut_windows(batch, 1) is batch
    with pytest.raises(UserError, match="context_length_divisors has 3, which does not divide the context length 8"):
        cut_windows(batch, 3)
    with pytest.raises(UserError, match="the batches of this run have no `tokens`"):
        cut_windows({"x": torch.zeros(2, 3)}, 2)
