"""Any past step of a run again, to the bit: its batch, its loss and its gradient.

Training has no hidden random state, so a step is a function of the checkpoint before it and of the data: the steps
between are trained again, in memory, and nothing of the run's directory is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.artifacts import verify_directory
from trainkit.checkpoints import Snapshot, checkpoint_step, list_checkpoints
from trainkit.distribution import gather_over_ranks
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.logging.records import Record, Scalar
from trainkit.loop import DataState, Run, Source, train
from trainkit.meter import Meter, means
from trainkit.step import StepSums
from trainkit.task import Batch
from trainkit.watchdog import Watchdog

VERIFIED = ("loss", "gradient_norm")
"""What a record of the run and the same record of its replay must agree in, to the bit."""


@dataclass(frozen=True)
class Replayed:
    """One step, on the CPU and as plain as JSON but for the tensors."""

    step: int
    """From 1, as the records count."""
    begin: int
    """Step of the checkpoint that it was trained from; 0 = none."""
    batches: list[dict[str, Tensor]]
    """The step's micro-batches of all ranks, in their order."""
    position: list[DataState]
    """Of each rank in the data, after the step: what a checkpoint of it would record."""
    metrics: dict[str, float]
    """Means over this step alone; `loss` and `gradient_norm` (before clipping) among them."""
    gradients: dict[str, Tensor]
    """By parameter name, before clipping."""
    records: list[Record]
    """The training records from the beginning up to the step, as the run must have written them."""


@dataclass(frozen=True)
class Check:
    """A recorded number beside the replayed one."""

    step: int
    name: str
    recorded: float
    replayed: float

    @property
    def is_same(self) -> bool:
        return self.recorded.hex() == self.replayed.hex()


def checkpoint_before(root: Path, step: int, report: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint from which `step` is yet to be trained; damaged ones are reported, not touched."""
    for path in reversed([path for path in list_checkpoints(root) if checkpoint_step(path) < step]):
        try:
            verify_directory(path)
        except UserError as error:
            report(f"{error}; trying an older checkpoint")
        else:
            return path
    return None


def replay_step(run: Run, step: int, begin: Snapshot | None) -> Replayed:
    """Train from `begin` (None: from the start) until the gradient of `step` is there; every rank calls it.

    Nothing is saved, validated, sampled or logged; the result is whole on the first rank. Raises `UserError` where the
    run's numbers stop being finite before, and where no rank holds whole gradients.
    """
    if run.distributed.strategy == "fsdp" and run.world.size > 1:
        raise UserError(
            'distributed.strategy = "fsdp" leaves no rank with a whole gradient: replay it on one process '
            "(replay.processes=1)",
            EXIT_USAGE,
        )
    source = _Positions(run.source)
    log = _Records()
    seen = _Seen(run, source, step, begin.trainer["step"] if begin else 0)
    watchdog = Watchdog(run.distributed.watchdog_seconds, rank=run.world.rank)  # the run's own would write its status
    quiet = replace(
        run, source=source, prefetch=0, log=log, checkpoints=None, evaluate=None, sample=None, watchdog=watchdog
    )
    train(replace(quiet, inspect=seen.inspect, stop_requested=lambda: seen.result is not None), resume=begin)
    if seen.result is None:
        raise UserError(
            f"step {step} was not reached again: "
            + (log.messages[-1] if log.messages else "the run ends before; see its log.txt")
        )
    return replace(seen.result, records=[record for record in log.records if int(record["step"] or 0) <= step])


def verify_records(recorded: Iterable[Mapping[str, Scalar]], replayed: Replayed) -> list[Check]:
    """The numbers of the replayed records that the run recorded too, over the same steps.

    A record holds means since the record before it. Where the run had another `training.log_every` at the time, its
    records span other steps and say nothing about these.
    """
    spans = _spans(recorded)
    checks: list[Check] = []
    for (before, step), own in _spans(replayed.records).items():
        # The first record after a checkpoint goes on with sums that the checkpoint holds, back to the record before it.
        theirs = spans.get((before, step)) if before else _around(replayed.begin, step, spans)
        checks += [
            Check(step, name, float(theirs[name] or 0), float(own[name] or 0))
            for name in VERIFIED
            if theirs is not None and name in theirs and name in own
        ]
    return checks


def _spans(records: Iterable[Mapping[str, Scalar]]) -> dict[tuple[int, int], Mapping[str, Scalar]]:
    """Training records by the steps that they span: (last step of the record before, last step)."""
    spans: dict[tuple[int, int], Mapping[str, Scalar]] = {}
    before = 0
    for record in records:
        if record["kind"] == "train":
            step = int(record["step"] or 0)
            spans[before, step] = record
            before = step
    return spans


def _around(
    begin: int, step: int, spans: Mapping[tuple[int, int], Mapping[str, Scalar]]
) -> Mapping[str, Scalar] | None:
    return next((record for (start, end), record in spans.items() if start <= begin and end == step), None)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 norm of each tensor, in 64 bits."""
    return {name: float(torch.linalg.vector_norm(t, dtype=torch.float64)) for name, t in tensors.items()}


class _Seen:
    """Keeps what the loop shows at one step."""

    def __init__(self, run: Run, source: _Positions, step: int, begin: int) -> None:
        self._run, self._source, self._step, self._begin = run, source, step, begin
        self.result: Replayed | None = None

    def inspect(
        self, step: int, micro_batches: Sequence[Batch], sums: StepSums, unscale: Callable[[Tensor], Tensor]
    ) -> None:
        if step != self._step:
            return
        world = self._run.world
        gradients = _gradients(self._run.model, unscale)
        # As the loop takes it, so that it has the same bits.
        norm = unscale(nn.utils.get_total_norm([p.grad for p in self._run.model.parameters() if p.grad is not None]))
        meter = Meter(world)
        meter.add(sums, norm, torch.zeros((), dtype=torch.bool, device=norm.device))
        batches = gather_over_ranks(
            [{name: t.cpu().clone() for name, t in batch.items()} for batch in micro_batches], world
        )
        self.result = Replayed(
            step=step,
            begin=self._begin,
            batches=[batch for of_rank in batches for batch in of_rank],
            position=gather_over_ranks(self._source.position, world),
            metrics=means(meter.totals()),
            gradients=gradients,
            records=[],
        )


def _gradients(model: nn.Module, unscale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {
        name: unscale(p.grad.detach()).to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@dataclass
class _Positions:
    """A source that remembers where it was last: the loop's step, as nothing reads ahead."""

    source: Source
    position: DataState = field(default_factory=dict[str, Any])

    def steps(self, states: list[DataState] | None) -> Generator[tuple[list[Batch], DataState]]:
        steps = self.source.steps(states)
        try:
            for batches, self.position in steps:
                yield batches, self.position
        finally:
            steps.close()


class _Records:
    """A log in memory."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.messages: list[str] = []

    def write(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train":
            self.records.append(dict(record))

    def message(self, text: str, step: int) -> None:
        self.messages.append(text)

    @property
    def offset(self) -> int:
        return 0

    @property
    def loggers(self) -> Mapping[str, Any]:
        return {}
