"""Streams of real files through the real tokenizer: text in, the same text out."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainkit.data.documents import iterate_documents, open_local_documents
from trainkit.data.prefetch import prefetch
from trainkit.data.specs import PackedDataSpec, RowsDataSpec
from trainkit.data.streams import PackedSource, RowsSource, StreamSource
from transformerlm.corpus.stories import sample
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

TEXTS = [sample(3, index)[: 40 + 37 * index % 400] + f" é#{index}" for index in range(120)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerTrainingSpec(vocab_size=300), threads=1)


def write_folder(folder: Path) -> Path:
    """One part of the texts in each format."""
    parts = [TEXTS[start : start + 20] for start in range(0, 120, 20)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in parts[0])
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in parts[1]).encode())
    )
    (folder / "c.txt").write_text("\n<|endoftext|>\n".join(parts[2]))
    pq.write_table(pa.table({"text": parts[3]}), folder / "d.parquet", row_group_size=6)
    (folder / "e.lines").write_text("\n".join(text.replace("\n", " ") for text in parts[4]))
    (folder / "f.lines.gz").write_bytes(gzip.compress("\n".join(t.replace("\n", " ") for t in parts[5]).encode()))
    (folder / "g.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    (folder / "h.txt").write_text("")
    return folder


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "rows"])
def test_an_epoch_is_the_text_of_the_files(tmp_path: Path, tokenizer: Tokenizer, packing: str, workers: int) -> None:
    folder = write_folder(tmp_path)
    expected = sorted(text for text in iterate_documents([folder]) if text)
    assert len(expected) == 120
    longest = max(map(len, tokenizer.encode_batch(expected)))
    shared: dict[str, Any] = {
        "documents": open_local_documents(folder),
        "encode": partial(tokenizer.encode_batch, allowed_special="none"),
        "eot_id": tokenizer.eot_id,
        "context_length": longest + 1,
        "samples_per_step": 2,
        "device_batch_size": 2,
        "seed": 0,
    }
    source: StreamSource
    if packing == "rows":
        source = RowsSource(spec=RowsDataSpec(lanes=1, shuffle_window=50, workers=workers), **shared)
    else:
        spec = PackedDataSpec(lanes=1, shuffle_window=50, workers=workers, packing=packing, best_fit_documents=30)  # type: ignore[arg-type]
        source = PackedSource(spec=spec, **shared)
    ids: list[int] = []
    with closing(prefetch(source.steps(), 2)) as steps:
        for batches, _ in islice(steps, 75 if packing == "rows" else 40):
            tokens, documents = batches[0]["tokens"][:, 1:], batches[0]["documents"][:, 1:]
            ids += tokens[documents >= 0].tolist()
    texts = tokenizer.decode(ids).split("<|endoftext|>")
    assert sorted(texts[:120]) == expected
    assert texts[:120] != list(iterate_documents([folder]))[:120]
