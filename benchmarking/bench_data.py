"""Token files: how fast they are read and made, beside the usual ways.

    uv run python -m benchmarking.bench_data             # all parts, or the named ones: read open memory make

- `read`: batches per second of our source in both orders, of megatron-core's `GPTDataset` where it is installed
  (`uv pip install --no-deps --target DIR megatron-core`, `PYTHONPATH=DIR`), and of random windows of a memory map.
- `open`: a prefix of 10⁹ tokens in a million documents is opened and its last sample read; so is verification.
- `memory`: memory of the process over 10⁵ batches.
- `make`: `transformerlm-make-data` beside `tokenizers` in `datasets.map`, whole commands on all cores, on sources and
  documentation of the installed packages.

Contestants take turns; medians and ratios are printed, and one JSON line last.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trainkit.data.megatron import IndexedTokens, bin_path, idx_path, verify
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.orders import build_order
from trainkit.data.specs import OrderName
from trainkit.data.windows import MegatronSource

ROWS, LENGTH = 8, 1024
TOKENS, DOCUMENT = 50_000_000, 250
BATCHES, REPEATS = 300, 7
MEMORY_BATCHES = 100_000
CHARACTERS, PIECE, VOCABULARY = 16_000_000, 4000, 4096
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Results = dict[str, float]
Batches = Iterator[Any]


def main() -> None:
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], Results]] = {
        "read": bench_read,
        "open": bench_open,
        "memory": bench_memory,
        "make": bench_make,
    }
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    results: Results = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results |= parts[name](Path(folder))
    print(json.dumps(results))


def write_random(prefix: Path) -> IndexedTokens:
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, "uint16") as writer:
        for _ in range(20):
            lengths = rng.poisson(DOCUMENT, size=TOKENS // 20 // DOCUMENT)
            writer.add(rng.integers(0, 50_000, size=int(lengths.sum())), lengths)
    return IndexedTokens.open(prefix)


# -- reading -----------------------------------------------------------------------------------------------------------


def our_batches(data: IndexedTokens, order: OrderName, *, length: int = LENGTH) -> Batches:
    num_samples = 4 * len(data.tokens) // length
    samples = build_order(order, [data], [], context_length=length, seed=1, num_samples=num_samples)
    source = MegatronSource(order=samples, samples_per_step=ROWS, device_batch_size=ROWS)
    return (batches[0] for batches, _ in source.steps())


def their_batches(data: IndexedTokens) -> Batches:
    """What a collating loader makes of `GPTDataset`: inputs and labels of each sample, stacked."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # pyright: ignore
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # pyright: ignore
    from megatron.core.datasets.utils import Split  # pyright: ignore

    tokenizer = SimpleNamespace(
        vocab_size=None, pad=-1, eod=-2, special_tokens_dict={"eod": -2}, unique_identifiers={"name": "none"}
    )
    config: Any = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    prefix, indices = str(data.prefix), np.arange(len(data.lengths), dtype=np.int32)
    num_samples = 4 * len(data.tokens) // LENGTH
    dataset: Any = GPTDataset(IndexedDataset(prefix), prefix, indices, num_samples, Split.train, config)
    for first in range(0, num_samples - ROWS, ROWS):
        samples = [dataset[first + row] for row in range(ROWS)]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels")}


def random_windows(data: IndexedTokens) -> Batches:
    """The loader of many small training scripts: a fresh map, random starts, inputs and targets cut row by row."""
    while True:
        tokens = np.memmap(bin_path(data.prefix), np.uint16, mode="r")
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,))
        yield tuple(
            torch.stack([torch.from_numpy(tokens[at + shift : at + shift + LENGTH].astype(np.int64)) for at in starts])
            for shift in (0, 1)
        )


def bench_read(folder: Path) -> Results:
    data = write_random(folder / "x")
    contestants = {
        "ours, stable order": our_batches(data, "stable"),
        "ours, order of Megatron-LM": our_batches(data, "megatron"),
        "random windows": random_windows(data),
    }
    with suppress(ImportError):
        theirs = their_batches(data)
        next(theirs)
        contestants["GPTDataset"] = theirs
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for batches in contestants.values():
        next(batches)  # indices are made on first use
    for _ in range(REPEATS):
        for name, batches in contestants.items():
            start = time.perf_counter()
            for _ in islice(batches, BATCHES):
                pass
            rates[name].append(BATCHES / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"read: {ROWS} × {LENGTH} tokens of {len(data.tokens):,}, one thread, median of {REPEATS} × {BATCHES} batches"
    )
    for name, rate in medians.items():
        print(f"  {name:<28}{rate:10,.0f} batches/s")
    ours = {"stable": medians["ours, stable order"], "megatron": medians["ours, order of Megatron-LM"]}
    results = {f"{name}_batches_per_s": rate for name, rate in ours.items()}
    for peer in ("GPTDataset", "random windows"):
        if peer not in medians:
            print(f"  {peer} is not installed")
            continue
        for name, rate in ours.items():
            results[f"{name}_over_{peer.replace(' ', '_')}"] = rate / medians[peer]
            print(f"  {name} order over {peer}: {rate / medians[peer]:.2f}×")
    return results


# -- opening -----------------------------------------------------------------------------------------------------------


def bench_open(folder: Path) -> Results:
    """No manifest: `identity` has to hash the index, too."""
    prefix, documents, each = folder / "x", 1_000_000, 1000
    with bin_path(prefix).open("wb") as file:
        file.truncate(documents * each * 2)
    tables = (
        np.array([documents, documents + 1], "<u8"),
        np.full(documents, each, "<i4"),
        np.arange(documents, dtype="<i8") * each * 2,
        np.arange(documents + 1, dtype="<i8"),
    )
    header = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([8])
    idx_path(prefix).write_bytes(header + b"".join(table.tobytes() for table in tables))
    last = (documents * each - 1) // LENGTH - 1
    opening: list[float] = []
    seeking: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        data = IndexedTokens.open(prefix)
        order = build_order("stable", [data], [], context_length=LENGTH, seed=1, num_samples=last)
        middle = time.perf_counter()
        source = MegatronSource(order=order, samples_per_step=1, device_batch_size=1)
        next(iter(source.steps([{"next_sample": last, **order.identity}])))
        opening.append(middle - start)
        seeking.append(time.perf_counter() - middle)
    a, b = statistics.median(opening), statistics.median(seeking)
    print(f"open: 10⁹ tokens in {documents:,} documents, median of {REPEATS}")
    print(f"  opened in {a * 1e3:.1f} ms, last sample {b * 1e3:.1f} ms later: {(a + b) * 1e3:.1f} ms")
    small = write_random(folder / "y")
    start = time.perf_counter()
    verify(small.prefix)
    rate = (small.tokens.nbytes + idx_path(small.prefix).stat().st_size) / (time.perf_counter() - start)
    print(f"  verified at {rate / 1e9:.2f} GB/s")
    return {"open_ms": a * 1e3, "seek_ms": b * 1e3, "verify_gb_per_s": rate / 1e9}


# -- memory ------------------------------------------------------------------------------------------------------------


def own_memory() -> float:
    """MiB that belong to the process alone; pages of a mapped file are the system's cache and come and go."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def bench_memory(folder: Path) -> Results:
    data = write_random(folder / "x")
    results: Results = {}
    print(f"memory: growth from batch {MEMORY_BATCHES // 10:,} to batch {MEMORY_BATCHES:,} of {ROWS} × 128 tokens")
    names: tuple[OrderName, ...] = ("stable", "megatron")
    for name in names:
        batches = our_batches(data, name, length=128)
        for _ in islice(batches, MEMORY_BATCHES // 10):
            pass
        before = own_memory()
        for _ in islice(batches, MEMORY_BATCHES - MEMORY_BATCHES // 10):
            pass
        results[f"{name}_growth_mib"] = own_memory() - before
        print(f"  {name:<10}{before:8.1f} MiB, then {results[f'{name}_growth_mib']:+.2f} MiB")
    return results


# -- making ------------------------------------------------------------------------------------------------------------


def map_with_datasets(text: str, tokenizer: str, cache: str) -> None:
    """The Hugging Face way to token ids: `tokenizers` in `datasets.map` on all cores."""
    import datasets
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    end: Any = encoder.token_to_id("<|endoftext|>")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*found.ids, end] for found in encoder.encode_batch(rows["text"], add_special_tokens=False)]}

    rows: Any = datasets.load_dataset("json", data_files=text, split="train", cache_dir=cache)
    rows.map(encode, batched=True, num_proc=CORES, remove_columns=["text"])


def bench_make(folder: Path) -> Results:
    from benchmarking.bench_tokenizer import machine_texts, text_of
    from transformerlm.tokenizer.specs import TokenizerTrainingSpec
    from transformerlm.tokenizer.trainer import train_tokenizer

    found = text_of(machine_texts(), CHARACTERS)
    documents = [found[at : at + PIECE] for at in range(0, len(found), PIECE)]
    train_tokenizer(documents[:500], TokenizerTrainingSpec(vocab_size=VOCABULARY)).save(folder / "tokenizer")
    text = folder / "train.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")

    def ours(number: int) -> list[str]:
        settings = [f"tokenizer.path={folder / 'tokenizer'}", f"output.train_prefix={folder / str(number)}"]
        corpus = ["corpus.kind=files", f'corpus.train_paths=["{text}"]', "output.val_prefix="]
        return [sys.executable, "-m", "cli.make_data", *settings, *corpus, "--workers", str(CORES)]

    def theirs(number: int) -> list[str]:
        call = f"map_with_datasets({str(text)!r}, {str(folder / 'tokenizer')!r}, {str(folder / f'cache-{number}')!r})"
        return [sys.executable, "-c", f"from benchmarking.bench_data import *; {call}"]

    seconds: dict[str, list[float]] = {"ours": [], "datasets.map": []}
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1"}
    for number in range(3):
        for name, command in (("ours", ours(number)), ("datasets.map", theirs(number))):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            seconds[name].append(time.perf_counter() - start)
    tokens = len(IndexedTokens.open(folder / "0").tokens)
    a, b = statistics.median(seconds["ours"]), statistics.median(seconds["datasets.map"])
    megabytes = text.stat().st_size / 1e6
    print(f"make: {megabytes:.0f} MB of JSONL, {tokens:,} tokens, {CORES} cores, whole commands, median of 3")
    print(f"  transformerlm-make-data       {tokens / a:12,.0f} tokens/s, {a:.1f} s")
    print(f"  tokenizers in datasets.map    {tokens / b:12,.0f} tokens/s, {b:.1f} s")
    print(f"  {b / a:.2f}×")
    return {"make_tokens_per_s": tokens / a, "make_over_datasets_map": b / a}


if __name__ == "__main__":
    main()
