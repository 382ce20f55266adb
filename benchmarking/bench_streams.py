"""What reading, shuffling, encoding and packing text costs a training step: the real pipeline beside a cached batch.

    uv run python -m benchmarking.bench_streams [FILE_OR_FOLDER]

A tiny model trains in one thread on steps of 2,048 tokens, in turns: from the stream (one worker, two steps ahead),
from one batch. The text is stories of the grammar unless a file or folder is named. For each packing it prints the
median time of a step, the ratio of the medians and of the means, and what a step of the stream takes with no training
beside it, in seconds of all threads together; one JSON line last.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from trainkit.data.documents import open_local_documents
from trainkit.data.prefetch import prefetch
from trainkit.data.specs import PackedDataSpec, RowsDataSpec
from trainkit.data.streams import PackedSource, RowsSource, StreamSource
from trainkit.optimizers import build_optimizer
from trainkit.specs import AdamWSpec
from trainkit.task import Batch
from transformerlm.corpus.stories import sample
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.objectives.build import build_objective
from transformerlm.objectives.specs import AutoregressiveSpec
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

CONTEXT = 256
SAMPLES = 8
TURN = 10
"""Steps of a turn."""
TURNS = 8
STORIES = 10_000
Packing = Literal["concatenate", "best_fit", "rows"]
PACKINGS: tuple[Packing, ...] = ("concatenate", "best_fit", "rows")


def build_source(path: Path, packing: Packing, tokenizer: Tokenizer) -> StreamSource:
    make = (
        partial(RowsSource, spec=RowsDataSpec(workers=1))
        if packing == "rows"
        else partial(PackedSource, spec=PackedDataSpec(workers=1, packing=packing))
    )
    return make(
        documents=open_local_documents(path),
        encode=partial(tokenizer.encode_batch, allowed_special="none"),
        eot_id=tokenizer.eot_id,
        context_length=CONTEXT,
        samples_per_step=SAMPLES,
        device_batch_size=SAMPLES,
        seed=0,
    )


class Trainer:
    """Steps of a tiny model."""

    def __init__(self, vocab_size: int) -> None:
        spec = TransformerSpec(context_length=CONTEXT, num_layers=2, d_model=128, num_heads=4)
        self.model = create_model(spec, vocab_size=vocab_size)
        self.task = build_objective(AutoregressiveSpec(), spec)
        self.optimizer = build_optimizer(AdamWSpec(), self.model)

    def step(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Take the next batch and train on it: wall-clock seconds, and processor seconds of all threads."""
        start, worked = time.perf_counter(), time.process_time()
        batch = next(batches)
        self.task.loss(self.model, batch, self.task.weights(batch)).value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start, time.process_time() - worked


def compare(path: Path, packing: Packing, tokenizer: Tokenizer) -> dict[str, float]:
    source = build_source(path, packing, tokenizer)
    trainer = Trainer(tokenizer.vocab_size)
    times: dict[str, list[tuple[float, float]]] = {"stream": [], "cached": []}
    with closing(prefetch(source.steps(), 2)) as steps:
        streamed = (batches[0] for batches, _ in steps)
        batch = next(streamed)
        feeds = {"stream": streamed, "cached": iter(lambda: batch, None)}
        for _ in range(TURN):
            trainer.step(feeds["cached"])
        for turn in range(TURNS):
            for name in ("stream", "cached") if turn % 2 else ("cached", "stream"):
                times[name] += [trainer.step(feeds[name]) for _ in range(TURN)]
    wall = {name: [seconds for seconds, _ in taken] for name, taken in times.items()}
    median = {name: statistics.median(taken) for name, taken in wall.items()}
    mean = {name: statistics.mean(taken) for name, taken in wall.items()}
    alone = stream_alone(source)
    cached_work = statistics.median(worked for _, worked in times["cached"])
    return {
        "step_ms": 1e3 * median["cached"],
        "ratio": median["stream"] / median["cached"],
        "ratio_of_means": mean["stream"] / mean["cached"],
        "stream_ms": 1e3 * alone,
        "stream_share_of_work": alone / cached_work,
    }


def stream_alone(source: StreamSource, steps: int = 500) -> float:
    """Processor seconds of a step of the stream, all of its threads together, and the start included."""
    start = time.process_time()
    with closing(source.steps()) as stream:
        for _ in islice(stream, steps):
            pass
        return (time.process_time() - start) / steps


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    stories = [sample(0, index) for index in range(STORIES)]
    tokenizer = train_tokenizer(stories[:2000], TokenizerTrainingSpec(vocab_size=2048, allow_smaller=True))
    tokenizer.encode_batch(stories[:2000])  # compile, and know the words as after the first minute of a run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stories.jsonl"
        path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
        results = {
            packing: compare(Path(arguments[0]) if arguments else path, packing, tokenizer) for packing in PACKINGS
        }
    for packing, result in results.items():
        print(
            f"{packing:12} step {result['step_ms']:.1f} ms; with the stream {result['ratio']:.3f}× (medians), "
            f"{result['ratio_of_means']:.3f}× (means); stream alone {result['stream_ms']:.2f} ms of processor time, "
            f"{100 * result['stream_share_of_work']:.1f} % of a step's"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
