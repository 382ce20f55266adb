"""Token files and the order of samples beside megatron-core itself.

It is no dependency of the project. `uv pip install --no-deps --target DIR megatron-core` fetches it; then
`PYTHONPATH=DIR pytest tests/trainkit/test_data_megatron_core.py` compares. Wheels carry its compiled helper.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.data.megatron import DTYPE_CODES, IndexedTokens, bin_path, idx_path
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.orders import MegatronOrder, build_order
from trainkit.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # their warnings are not ours

CASES = 1000
WHERE = "megatron-core is not installed; uv pip install --no-deps --target DIR megatron-core, then PYTHONPATH=DIR"


def core(name: str) -> Any:
    return pytest.importorskip(f"megatron.core.datasets.{name}", reason=WHERE)


def random_documents(rng: np.random.Generator, dtype: str, *, documents: int = 30) -> list[list[np.ndarray]]:
    """Documents of several sequences, some of them empty."""
    high = np.iinfo(dtype).max

    def sequence() -> np.ndarray:
        return rng.integers(0, high, size=int(rng.integers(0, 40)), endpoint=True, dtype=dtype)

    found = [[sequence() for _ in range(rng.integers(0, 4))] for _ in range(rng.integers(1, documents))]
    return [*found, [np.arange(3, dtype=dtype)]]


def write_theirs(prefix: Path, documents: list[list[np.ndarray]], dtype: str) -> None:
    builder = core("indexed_dataset").IndexedDatasetBuilder(str(bin_path(prefix)), dtype=getattr(np, dtype))
    for document in documents:
        for sequence in document:
            builder.add_item(torch.from_numpy(sequence.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))


def test_files_equal_those_of_megatron_core(tmp_path: Path) -> None:
    """Ours byte for byte where a document is one sequence; theirs read back whatever they hold."""
    indexed = core("indexed_dataset")
    rng = np.random.default_rng(7)
    names = sorted(dtype.name for dtype in DTYPE_CODES.values())
    assert len(names) == 6
    for case in range(CASES):
        dtype = names[case % len(names)]
        documents = random_documents(rng, dtype)
        whole = [np.concatenate([np.empty(0, dtype), *document]) for document in documents]
        write_theirs(tmp_path / "theirs", [[document] for document in whole], dtype)
        with IndexedWriter(tmp_path / "ours", dtype) as writer:
            for document in whole:
                writer.add(document)
        for path in (bin_path, idx_path):
            assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes(), (case, dtype)
        theirs = indexed.IndexedDataset(str(tmp_path / "ours"))
        assert all(np.array_equal(theirs[i], document) for i, document in enumerate(whole)), (case, dtype)
        write_theirs(tmp_path / "parts", documents, dtype)
        read = IndexedTokens.open(tmp_path / "parts")
        assert [read.document(i).tolist() for i in range(len(read))] == [one.tolist() for one in whole], (case, dtype)
        starts = read.pointers // read.tokens.itemsize
        parts = [read.tokens[at : at + n].tolist() for at, n in zip(starts, read.lengths, strict=True)]
        assert parts == [sequence.tolist() for document in documents for sequence in document], (case, dtype)


def their_dataset(
    prefixes: list[Path], weights: list[float] | None, *, length: int, seed: int, num_samples: int
) -> Any:
    """What Megatron-LM would train on."""
    gpt, builder = core("gpt_dataset"), core("blended_megatron_dataset_builder")
    tokenizer = SimpleNamespace(
        vocab_size=None, pad=-1, eod=-2, special_tokens_dict={"eod": -2}, unique_identifiers={"name": "none"}
    )
    config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=length,
        blend=([str(prefix) for prefix in prefixes], weights),
        split="1,0,0",
        path_to_cache=None,  # below the prefix; with a path, its blends want torch.distributed
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    build = builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, [num_samples, 0, 0], lambda: True, config)
    return build.build()[0]


def check_samples(ours: Any, theirs: Any, samples: np.ndarray) -> None:
    tokens, _ = ours.read(samples)
    for row, sample in zip(tokens, samples, strict=True):
        item = theirs[int(sample)]
        assert row[:-1].tolist() == item["tokens"].tolist()
        assert row[1:].tolist() == item["labels"].tolist()


def test_orders_equal_gpt_dataset(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    separate = 0
    for case in range(CASES):
        prefix = tmp_path / f"data-{case // 10}"
        if case % 10 == 0:
            write_theirs(prefix, random_documents(rng, "int32"), "int32")
        data = IndexedTokens.open(prefix)
        length, seed = int(rng.integers(2, 40)), int(rng.integers(0, 2**32))
        num_samples = max(1, int(rng.uniform(0, 6) * len(data.tokens) / length))
        theirs = their_dataset([prefix], None, length=length, seed=seed, num_samples=num_samples)
        ours = MegatronOrder(data, length, seed, num_samples)
        for name in ("document_index", "shuffle_index"):
            expected = getattr(theirs, name)
            assert np.array_equal(getattr(ours, name), expected) and getattr(ours, name).dtype == expected.dtype, case
        assert np.array_equal(ours.sample_index, theirs.sample_index), case
        check_samples(ours, theirs, rng.integers(0, num_samples, size=5))
        separate += not np.array_equal(np.sort(ours.shuffle_index[:num_samples]), np.arange(num_samples))
    assert separate > 0


def test_blends_equal_blended_dataset(tmp_path: Path) -> None:
    """Where Megatron-LM's blend is an `IndexError` (rounding, in short runs of many members), ours is one sentence."""
    rng = np.random.default_rng(13)
    prefixes = [tmp_path / f"data-{number}" for number in range(8)]
    for prefix in prefixes:
        write_theirs(prefix, random_documents(rng, "int32"), "int32")
    refused = 0
    for case in range(CASES):
        members = [prefixes[i] for i in rng.permutation(len(prefixes))[: rng.integers(2, 9)]]
        data = [IndexedTokens.open(prefix) for prefix in members]
        weights = [float(weight) for weight in rng.choice([0.1, 0.25, 0.5, 1.0, 3.0, rng.uniform(0.01, 9)], len(data))]
        length, seed, num_samples = (int(rng.integers(low, high)) for low, high in ((2, 30), (0, 2**32), (1, 400)))
        length = min(length, *(len(one.tokens) - 1 for one in data))
        arguments: dict[str, int] = {"seed": seed, "num_samples": num_samples}
        try:
            theirs = their_dataset(members, weights, length=length, **arguments)
        except IndexError:
            with pytest.raises(UserError, match="the run is too short for these weights"):
                build_order("megatron", data, weights, context_length=length, **arguments)
            refused += 1
            continue
        ours = build_order("megatron", data, weights, context_length=length, **arguments)
        owners, within = ours.deal(np.arange(theirs.size))
        assert np.array_equal(owners, theirs.dataset_index), case
        assert np.array_equal(within, theirs.dataset_sample_index), case
        for mine, other in zip(ours.members, theirs.datasets, strict=True):
            for name in ("document_index", "sample_index", "shuffle_index"):
                assert np.array_equal(getattr(mine, name), getattr(other, name)), (case, name)
        check_samples(ours, theirs, rng.integers(0, num_samples, size=5))
    assert refused < CASES // 2
