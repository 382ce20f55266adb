"""Data in real processes: ranks that share nothing but files, and a run that is killed again and again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainkit.streams import LENGTH, MOST_TOKENS, SAMPLES, Samples, collect, make_source, text
from trainkit.data.documents import open_local_documents
from trainkit.data.megatron import IndexedTokens
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.orders import build_order
from trainkit.data.prefetch import prefetch
from trainkit.data.windows import MegatronSource
from trainkit.loop import Source

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
LANES = 4
STEPS = 15


def write_parquet(folder: Path, count: int, *, files: int, tokens: int) -> Path:
    """Rows of 1 … `tokens` tokens, in a few row groups of each file."""
    lengths = np.random.default_rng(1).integers(1, tokens + 1, count)
    texts = [text(row, int(length)) for row, length in enumerate(lengths)]
    folder.mkdir()
    bounds = np.linspace(0, count, files + 1).astype(int)
    for number, (start, end) in enumerate(pairwise(bounds)):
        pq.write_table(pa.table({"text": texts[start:end]}), folder / f"{number}.parquet", row_group_size=37)
    return folder


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


# -- ranks -------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, pipeline: str) -> Path:
    """Parquet, fewer files than ranks, or token files."""
    if pipeline not in ("stable", "megatron"):
        return write_parquet(folder, 150, files=2, tokens=40)
    lengths = np.random.default_rng(1).integers(0, 41, 150)
    with IndexedWriter(folder / "x", "uint16") as writer:
        writer.add(np.arange(lengths.sum()), lengths)
    return folder


def open_source(folder: Path, pipeline: str, rank: int, size: int) -> Source:
    shared: dict[str, Any] = {"rank": rank, "world_size": size, "device_batch_size": rank + 3}
    match pipeline:
        case "stable" | "megatron":
            tokens = [IndexedTokens.open(folder / "x")]
            settings = {"context_length": LENGTH, "seed": 5, "num_samples": STEPS * SAMPLES}
            order = build_order(pipeline, tokens, [], **settings)
            return MegatronSource(order=order, samples_per_step=SAMPLES, **shared)
        case _:
            return make_source(open_local_documents(folder), pipeline, workers=size % 3, **shared)


def train_rank(folder: Path, out: Path, pipeline: str, rank: int, size: int, states: Any, steps: int) -> None:
    source = open_source(folder, pipeline, rank, size)
    samples: Samples = {}
    state: Any = None
    with closing(prefetch(source.steps(states), size - 1)) as stream:
        for batches, after in islice(stream, steps):
            state = after
            for batch in batches:
                collect(batch, samples)
    content = {
        "samples": [[g, *(part.hex() for part in samples[g])] for g in sorted(samples)],
        "state": state,
    }
    out.write_text(json.dumps(content))


def train_ranks(tmp_path: Path, folder: Path, pipeline: str, size: int, states: Any, steps: int) -> Any:
    outs = [tmp_path / f"rank-{rank}.json" for rank in range(size)]
    ranks = [start(train_rank, folder, out, pipeline, rank, size, states, steps) for rank, out in enumerate(outs)]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    contents = [json.loads(out.read_text()) for out in outs]
    samples = sorted(sample for content in contents for sample in content["samples"])
    return samples, [content["state"] for content in contents]


@pytest.mark.parametrize("pipeline", ["concatenate", "best_fit", "rows", "stable", "megatron"])
def test_processes_of_any_number_of_ranks_train_on_the_same_samples(tmp_path: Path, pipeline: str) -> None:
    """A third of the way with each number of them, over several epochs."""
    folder = write_data(tmp_path / "data", pipeline)
    whole, _ = train_ranks(tmp_path, folder, pipeline, 1, None, STEPS)
    samples: list[Any] = []
    states = None
    for size in (2, 4, 1):
        part, states = train_ranks(tmp_path, folder, pipeline, size, states, STEPS // 3)
        samples += part
    assert samples == whole and len(whole) == STEPS * SAMPLES


# -- kills -------------------------------------------------------------------------------------------------------------


def train_and_record(folder: Path, out: Path, packing: str) -> None:
    """Goes on from the last complete line of `out`, and adds a line a step, as safe as a checkpoint."""
    lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    complete = [line for line in lines if line.endswith(b"\n")]
    state = json.loads(complete[-1])["state"] if complete else None
    source = make_source(open_local_documents(folder), packing, lanes=LANES, shuffle_window=60, workers=1)
    with out.open("r+b" if out.exists() else "wb") as file:
        file.truncate(sum(map(len, complete)))
        file.seek(0, os.SEEK_END)
        for batches, after in prefetch(source.steps([state] if state else None), 2):
            samples: Samples = {}
            for batch in batches:
                collect(batch, samples)
            windows = [[np.frombuffer(part, np.int64).tolist() for part in samples[g]] for g in sorted(samples)]
            file.write(json.dumps({"windows": windows, "state": after}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            if all(position["block"]["epoch"] for position in after["positions"].values()):
                return


@pytest.mark.parametrize("packing", ["rows", "concatenate"])
def test_an_epoch_killed_five_times_holds_each_row_once(tmp_path: Path, packing: str) -> None:
    count = 3000
    folder = write_parquet(tmp_path / "data", count, files=5, tokens=LENGTH - 2)
    out = tmp_path / "trained.jsonl"
    dice = random.Random(packing)
    kills = 0
    for _ in range(5):
        process = start(train_and_record, folder, out, packing)
        # Of 400,000 bytes or more: a busy machine may let it write some of them before it is killed.
        reached = (out.stat().st_size if out.exists() else 0) + dice.randint(1, 60_000)
        while process.is_alive() and (not out.exists() or out.stat().st_size < reached):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 5
    process = start(train_and_record, folder, out, packing)
    process.join()
    assert process.exitcode == 0

    steps = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [step["state"]["next_sample"] for step in steps] == [SAMPLES * (1 + i) for i in range(len(steps))]
    # Every token of the second epoch comes behind the first epoch's in its lane; a row begins with its first token.
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    for step in steps:
        for number, (tokens, documents) in enumerate(step["windows"]):
            found = [t for t, d in list(zip(tokens, documents, strict=True))[1:] if d >= 0 and t % MOST_TOKENS == 1]
            lanes[number // (SAMPLES // LANES)] += [token // MOST_TOKENS for token in found]
    first_epoch = [row for lane, rows in enumerate(lanes) for row in rows[: len(range(lane, count, LANES))]]
    assert Counter(first_epoch) == dict.fromkeys(range(count), 1)
    assert first_epoch != sorted(first_epoch)
