"""The loop as its users see it: it learns, it resumes to the bit wherever it stopped, it never keeps bad numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainkit.ranks import alone, run_on_ranks
from tests.trainkit.toys import TOYS, Regression, ToySource
from trainkit.checkpoints import CheckpointStore, find_newest_intact, list_checkpoints, load_snapshot
from trainkit.comparing import MEASURED
from trainkit.distribution import World
from trainkit.errors import UserError
from trainkit.logging.records import read_records
from trainkit.logging.run_log import open_run_log
from trainkit.loop import Log, Result, Run, train
from trainkit.precision import resolve_precision
from trainkit.run import samples_per_step
from trainkit.specs import AdamWSpec, CheckpointSpec, CosineScheduleSpec, LoggingSpec, TrainingSpec
from trainkit.task import Batch, Loss, RunFacts, Task


@dataclass
class ListLog:
    """Keeps records in memory; floats as hex, so that equal means equal to the bit."""

    records: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def write(self, record: Mapping[str, Any]) -> None:
        kept = {k: v for k, v in record.items() if not MEASURED.fullmatch(k)}
        self.records.append({k: v.hex() if isinstance(v, float) else v for k, v in kept.items()})

    def message(self, text: str, step: int) -> None:
        self.messages.append(text)

    @property
    def offset(self) -> int:
        return len(self.records)

    @property
    def loggers(self) -> dict[str, Any]:
        return {}


def make_run(folder: Path, log: Log, *, toy: str = "language", world: World | None = None, **changes: Any) -> Run:
    build, task = TOYS[toy]
    world = world or alone()
    training = {"max_steps": 30, "total_batch_size": 12, "log_every": 4, "eval_every": 10, "save_every": 7}
    training |= {"ema_decay": 0.9, "device": "cpu", **changes.pop("training", {})}

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        with torch.no_grad():
            return {"val_loss": float(sum(p.square().sum() for p in model.parameters())) / step}

    arguments: dict[str, Any] = {
        "model": build(),
        "task": task,
        "source": ToySource(world),
        "training": TrainingSpec(**training),
        "optimizer": AdamWSpec(learning_rate=0.01),
        "schedule": CosineScheduleSpec(warmup_steps=3),
        "world": world,
        "log": log,
        "checkpoints": CheckpointStore(folder, CheckpointSpec(keep_last=2), report=lambda text: log.message(text, 0)),
        "evaluate": evaluate,
    }
    return Run(**(arguments | changes))


def newest(folder: Path) -> Any:
    path = find_newest_intact(CheckpointStore(folder, CheckpointSpec()))
    return load_snapshot(path) if path else None


def sha(folder: Path) -> str:
    """Of everything that the newest checkpoint holds in tensors, names sorted."""
    snapshot = newest(folder)
    digest = hashlib.sha256()
    for part in (snapshot.model, snapshot.optimizer, snapshot.average):
        for name in sorted(part):
            digest.update(name.encode() + part[name].numpy().tobytes())
    return digest.hexdigest()


def stop_after(steps: int) -> Any:
    calls = iter(range(1, 10_000))
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("toy", TOYS)
def test_every_toy_learns(tmp_path: Path, toy: str) -> None:
    log = ListLog()
    result = train(make_run(tmp_path, log, toy=toy, training={"max_steps": 120, "log_every": 20}))
    losses = [float.fromhex(r["loss"]) for r in log.records if r["kind"] == "train"]
    assert result.status == "finished" and result.step == 120
    assert losses[-1] < 0.8 * losses[0]
    assert [r["samples_seen"] for r in log.records if r["kind"] == "train"] == [240 * i for i in range(1, 7)]


@pytest.mark.parametrize("toy", ["language", "two-terms"])
def test_interrupted_at_random_steps_the_run_is_the_same_to_the_bit(tmp_path: Path, toy: str) -> None:
    undisturbed = ListLog()
    train(make_run(tmp_path / "a", undisturbed, toy=toy))

    draw, log, attempts = random.Random(toy), ListLog(), 0
    result = Result("preempted", 0, {}, None)
    while result.status != "finished":
        snapshot = newest(tmp_path / "b")
        # The log continues at the checkpoint's offset, as `metrics.jsonl` does.
        del log.records[snapshot.trainer["log_offset"] if snapshot else 0 :]
        run = make_run(tmp_path / "b", log, toy=toy, stop_requested=stop_after(draw.randint(1, 4)))
        result = train(run, resume=snapshot)
        attempts += 1
    assert attempts > 10
    assert log.records == undisturbed.records
    assert sha(tmp_path / "b") == sha(tmp_path / "a")


def test_resuming_from_an_older_checkpoint_gives_the_same_end(tmp_path: Path) -> None:
    log = ListLog()
    train(make_run(tmp_path / "a", log))
    train(make_run(tmp_path / "b", ListLog(), training={"max_steps": 30, "save_every": 7}))
    for path in list_checkpoints(tmp_path / "b")[1:]:
        (path / "model.safetensors").write_bytes(b"damage")
    log_b = ListLog()
    run = make_run(tmp_path / "b", log_b)
    path = find_newest_intact(run.checkpoints)
    assert path is not None and path.name < list_checkpoints(tmp_path / "b")[-1].name
    assert "damaged" in log_b.messages[0]
    train(run, resume=load_snapshot(path))
    assert sha(tmp_path / "b") == sha(tmp_path / "a")


def loop_on_ranks(world: World, folder: Path, stop_rank: int | None) -> tuple[Result, list[dict[str, Any]]]:
    log = ListLog()
    stop = (lambda: world.rank == stop_rank) if stop_rank is not None else (lambda: False)
    return train(make_run(folder, log, world=world, stop_requested=stop)), log.records


def test_two_ranks_agree_with_one_and_with_each_other(tmp_path: Path) -> None:
    log = ListLog()
    train(make_run(tmp_path / "one", log))
    for name in ("two", "stop"):
        (tmp_path / f"ranks-{name}").mkdir()
    ranks = run_on_ranks(2, loop_on_ranks, tmp_path / "ranks-two", tmp_path / "two", None)
    assert [result.status for result, _ in ranks] == ["finished", "finished"]
    assert ranks[0][1] == ranks[1][1]
    for mine, theirs in zip(log.records, ranks[0][1], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"kind"}:
            values = [float.fromhex(r[key]) if isinstance(r[key], str) else r[key] for r in (mine, theirs)]
            assert values[0] == pytest.approx(values[1], rel=1e-4), key
    a, b = newest(tmp_path / "one"), newest(tmp_path / "two")
    for name, tensor in a.model.items():
        torch.testing.assert_close(tensor, b.model[name], rtol=1e-3, atol=1e-5)

    stopped = run_on_ranks(2, loop_on_ranks, tmp_path / "ranks-stop", tmp_path / "stop", 1)
    assert [(result.status, result.step) for result, _ in stopped] == [("preempted", 2)] * 2  # agreed a step late
    assert newest(tmp_path / "stop").trainer["step"] == 2


class TurnsBad(Regression):
    """Infinite from sample 120 on."""

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, torch.Tensor]) -> Loss:
        loss = super().loss(model, batch, denominators)
        factor = torch.where(batch["sample"].max() >= 120, torch.inf, 1.0)
        return Loss(loss.value * factor, loss.metrics)


def test_non_finite_numbers_stop_the_run_and_are_never_saved(tmp_path: Path) -> None:
    log = ListLog()
    result = train(make_run(tmp_path, log, toy="mlp", task=TurnsBad(), training={"max_skipped_steps": 3}))
    assert result.status == "non-finite" and result.step == 14  # the bad ones are 11, 12, 13; then it looks
    snapshot = newest(tmp_path)
    assert snapshot.trainer["step"] == 10  # saved as the best
    assert "in a row" in log.messages[-1]
    assert "step 11 changed nothing: the loss of a micro-batch was infinite or NaN; its samples: " in str(log.messages)


def test_a_message_carries_the_step_at_which_it_is_said(tmp_path: Path) -> None:
    with closing(open_run_log(tmp_path, LoggingSpec(console="off", csv=False, plots=False), total_steps=30)) as log:
        bad = {"task": TurnsBad(), "training": {"max_skipped_steps": 3}}
        train(make_run(tmp_path / "checkpoints", log, toy="mlp", **bad))  # records at 4, 8, 12; the bad: 11, 12, 13
    said = [record for record in read_records(tmp_path / "metrics.jsonl") if record["kind"] == "message"]
    assert [record["step"] for record in said] == [0, 12, 12, 14, 14, 14], said


def test_accumulation_does_not_change_what_is_learnt(tmp_path: Path) -> None:
    ends = []
    for micro in (12, 5, 1):
        train(make_run(tmp_path / str(micro), ListLog(), source=ToySource(alone(), micro=micro)))
        ends.append(newest(tmp_path / str(micro)).model)
    for other in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_and_keeps_32_bit_weights(tmp_path: Path, precision: str) -> None:
    log = ListLog()
    train(make_run(tmp_path, log, toy="mlp", training={"precision": precision, "max_steps": 60}))
    losses = [float.fromhex(r["loss"]) for r in log.records if r["kind"] == "train"]
    assert losses[-1] < losses[0]
    snapshot = newest(tmp_path)
    assert {t.dtype for part in (snapshot.model, snapshot.optimizer) for t in part.values()} == {torch.float32}


def test_the_batch_must_be_a_whole_number_of_samples() -> None:
    facts = RunFacts("tokens", 256)
    assert samples_per_step(TrainingSpec(total_batch_size=1024), facts) == 4
    for size in (100, 300):
        with pytest.raises(UserError, match="multiple"):
            samples_per_step(TrainingSpec(total_batch_size=size), facts)


def test_tasks_satisfy_the_protocol() -> None:
    tasks: list[Task] = [task for _, task in TOYS.values()]
    assert len(tasks) == 3


def test_resuming_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    train(make_run(tmp_path, ListLog()))
    before, log = sha(tmp_path), ListLog()
    result = train(make_run(tmp_path, log), resume=newest(tmp_path))
    assert (result.status, result.step, log.records) == ("finished", 30, [])
    assert sha(tmp_path) == before


def test_auto_precision_is_a_concrete_one_and_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for is_native, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=is_native: answer)
        assert resolve_precision("auto", cpu) == name
        assert [resolve_precision(p, cpu) for p in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
