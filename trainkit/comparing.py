"""Where two runs begin to differ: settings, then records, then the tensors of their checkpoints.

Reads two run directories, writes nothing. A part that is missing or damaged is named and passed over: what remains is
still compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from trainkit.artifacts import verify_directory
from trainkit.checkpoints import checkpoint_step, list_checkpoints
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.logging.jsonl import METRICS_FILE
from trainkit.logging.records import HEADER, TEXT_KINDS, Record, Scalar, decode_record
from trainkit.run_directory import MAY_CHANGE, changed_settings, read_config, read_environment

MEASURED = re.compile(r"time|path|mfu|.*seconds|.*_per_second|.*memory.*|data_wait.*")
"""Names of records that tell how long something took or where it lies: two equal runs differ in them."""
TELLING = ("torch", "cuda", "cpu", "threads", "gpus", "variables", "git")
"""What of `environment.json` may explain a difference of numbers."""
BEGINNINGS = ("checkpoint.init_from", "checkpoint.resume_from")
"""Settings that a run may change when it resumes, and that still decide about its numbers."""
PARTS = ("model", "optimizer", "ema")
"""Of a checkpoint, in the order in which they are compared."""


@dataclass(frozen=True)
class MetricDifference:
    kind: str
    step: int
    name: str
    first: Scalar
    second: Scalar


@dataclass(frozen=True)
class TensorDifference:
    """The first tensor that differs, by its name within the first part of the checkpoint that does."""

    step: int
    part: str
    name: str
    max_difference: float
    """Largest absolute difference; NaN where there is none to take (another shape, or only in one run)."""
    elements: int
    """How many of it differ; 0 where they cannot be told apart one by one."""
    what: str
    """One sentence."""
    tensors: int
    """How many tensors of the checkpoint differ."""
    of: int


@dataclass(frozen=True)
class Comparison:
    first: str
    second: str
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of those that decide about numbers: `{dotted name: "value -> value"}`."""
    harmless: Mapping[str, str] = field(default_factory=dict[str, str])
    """The same of all others."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    metric: MetricDifference | None = None
    tensor: TensorDifference | None = None
    records: int = 0
    """Records that both have."""
    checkpoints: tuple[int, ...] = ()
    """Steps whose checkpoints were compared."""
    notes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        return not self.settings and self.metric is None and self.tensor is None

    @property
    def step(self) -> int | None:
        """The first one at which a number differs, as far as is known; 0 = before the first step."""
        steps = [found.step for found in (self.metric, self.tensor) if found is not None]
        return min(steps) if steps else None


def compare_runs(first: Path, second: Path, *, tensors: bool = True) -> Comparison:
    """Raises `UserError` where the two have nothing that could be compared."""
    for path in (first, second):
        if not path.is_dir():
            raise UserError(f"{path} is no folder; name the folders of two runs", EXIT_USAGE)
    notes: list[str] = []
    settings, harmless = _settings(first, second, notes.append)
    metric, records = _metrics(first, second, notes.append)
    tensor, checkpoints = _checkpoints(first, second, notes.append) if tensors else (None, [])
    if not records and not checkpoints and metric is None and tensor is None:
        said = "; ".join(notes)
        raise UserError(
            f"{first} and {second} have no step in common to compare{': ' if said else ''}{said}", EXIT_USAGE
        )
    return Comparison(
        first=str(first),
        second=str(second),
        settings=settings,
        harmless=harmless,
        environment=_environment(first, second),
        metric=metric,
        tensor=tensor,
        records=records,
        checkpoints=tuple(checkpoints),
        notes=tuple(notes),
    )


def _settings(first: Path, second: Path, note: Callable[[str], None]) -> tuple[dict[str, str], dict[str, str]]:
    configs = [read_config(path) for path in (first, second)]
    for path, config in zip((first, second), configs, strict=True):
        if not config:
            note(f"{path}/config.json is missing or damaged: settings are not compared")
    if not all(configs):
        return {}, {}
    mine, theirs = configs
    every = changed_settings(mine, theirs, ())
    counted = changed_settings(mine, theirs, MAY_CHANGE) | {name: every[name] for name in BEGINNINGS if name in every}
    return counted, {name: how for name, how in every.items() if name not in counted}


def _environment(first: Path, second: Path) -> dict[str, str]:
    mine, theirs = (
        {name: value for name, value in read_environment(path).items() if name in TELLING} for path in (first, second)
    )
    return changed_settings(mine, theirs, ()) if mine and theirs else {}


# -- records -----------------------------------------------------------------------------------------------------------


def _metrics(first: Path, second: Path, note: Callable[[str], None]) -> tuple[MetricDifference | None, int]:
    """The first difference among the records that both have, and how many these are."""
    mine, theirs = (_read(path / METRICS_FILE, note) for path in (first, second))
    common = [key for key in mine if key in theirs]
    for name, ours, others in ((first, mine, theirs), (second, theirs, mine)):
        alone = [step for kind, step in ours if (kind, step) not in others]
        if alone:
            note(f"{len(alone)} records are in {name} only, from step {min(alone)} to {max(alone)}")
    # A record of training before one of validation, as they were written.
    for kind, step in sorted(common, key=lambda key: key[1]):
        a, b = mine[kind, step], theirs[kind, step]
        for name in (name for name in a if name not in HEADER and not MEASURED.fullmatch(name)):
            if name in b and not _same(a[name], b[name]):
                return MetricDifference(kind, step, name, a[name], b[name]), len(common)
    return None, len(common)


def _read(path: Path, note: Callable[[str], None]) -> dict[tuple[str, int], Record]:
    """Records of numbers by (kind, step)."""
    records: dict[tuple[str, int], Record] = {}
    bad = 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        note(f"{path} cannot be read ({error.strerror}): records are not compared")
        return {}
    for line in lines:
        try:
            record = decode_record(line)
            if record["kind"] not in (*TEXT_KINDS, "checkpoint"):
                records[str(record["kind"]), int(record["step"] or 0)] = record
        except (ValueError, TypeError):
            bad += 1
    if bad:
        note(f"{path} has {bad} damaged lines, which are passed over")
    return records


def _same(a: Scalar, b: Scalar) -> bool:
    """To the bit: `hex` tells 0.0 from -0.0, and a NaN is written as text."""
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return a == b


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoints(first: Path, second: Path, note: Callable[[str], None]) -> tuple[TensorDifference | None, list[int]]:
    """The first difference among the checkpoints of common steps, and the steps that were looked at."""
    mine, theirs = (
        {checkpoint_step(path): path for path in list_checkpoints(run / "checkpoints")} for run in (first, second)
    )
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        note("they have no checkpoints of the same step: tensors are not compared")
    compared: list[int] = []
    for step in common:
        try:
            for path in (mine[step], theirs[step]):
                verify_directory(path)
        except UserError as error:
            note(f"{error}; step {step} is passed over")
            continue
        compared.append(step)
        found = _compare_checkpoints(step, mine[step], theirs[step])
        if found is not None:
            return found, compared
    return None, compared


def _compare_checkpoints(step: int, first: Path, second: Path) -> TensorDifference | None:
    found: tuple[str, str, float, int, str] | None = None
    different = total = 0
    for part in PARTS:
        mine, theirs = _tensor_files(first, part), _tensor_files(second, part)
        if not mine or not theirs:
            continue  # an average or an optimizer that only one of them keeps is a matter of settings
        for name in sorted({*mine, *theirs}):
            total += 1
            how = _compare_tensor(name, mine.get(name), theirs.get(name))
            if how is not None:
                different += 1
                found = found or (part, name, *how)
    if found is None:
        return None
    part, name, largest, elements, what = found
    return TensorDifference(step, part, name, largest, elements, what, different, total)


def _tensor_files(checkpoint: Path, part: str) -> dict[str, Path]:
    """Which file holds which tensor."""
    places: dict[str, Path] = {}
    for path in sorted(checkpoint.glob(f"{part}*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            places |= {name: path for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    return places


def _compare_tensor(name: str, first: Path | None, second: Path | None) -> tuple[float, int, str] | None:
    """Largest difference, number of elements that differ, and a sentence; None where all bits are the same."""
    if first is None or second is None:
        return float("nan"), 0, f"is in the {'second' if first is None else 'first'} run only"
    a, b = _load(first, name), _load(second, name)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return float("nan"), 0, f"is {tuple(a.shape)} {a.dtype} in one and {tuple(b.shape)} {b.dtype} in the other"
    elements = int((_bits(a) != _bits(b)).any(dim=1).sum())
    if not elements:
        return None
    largest = float((a.double() - b.double()).abs().max())
    return largest, elements, f"differs in {elements} of {a.numel()} elements, by {largest:.3g} at most"


def _bits(tensor: Tensor) -> Tensor:
    """uint8 [elements, bytes of one]: equal bits, not equal values, for NaN is equal to nothing."""
    return tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())


def _load(path: Path, name: str) -> Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values; floats of records as hexadecimal too."""

    def number(value: Scalar) -> dict[str, Scalar]:
        return {"value": value, "hex": value.hex()} if isinstance(value, float) else {"value": value}

    metric, tensor = comparison.metric, comparison.tensor
    largest = None if tensor is None or tensor.max_difference != tensor.max_difference else tensor.max_difference
    return {
        "first": comparison.first,
        "second": comparison.second,
        "equal": comparison.is_equal,
        "step": comparison.step,
        "settings": dict(comparison.settings),
        "harmless_settings": dict(comparison.harmless),
        "environment": dict(comparison.environment),
        "metric": metric and {**vars(metric), "first": number(metric.first), "second": number(metric.second)},
        "tensor": tensor and {**vars(tensor), "max_difference": largest},
        "records": comparison.records,
        "checkpoints": list(comparison.checkpoints),
        "notes": list(comparison.notes),
    }
