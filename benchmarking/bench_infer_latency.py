"""Next-token decoding beside the ways of diffusion: the same weights, the same length, in turns. Tables, then JSON.

    uv run transformerlm-bench-infer                                           # random weights of [model]
    uv run transformerlm-bench-infer --checkpoint runs/dual benchmark.judge=runs/ar
    uv run transformerlm-bench-infer 'benchmark.decodings=["ar", "steps"]' 'benchmark.batch_sizes=[1, 32]'

What `benchmark.decodings` names, all that the weights can do by default:

- `ar`: next tokens with a cache of keys and values.
- `confidence`: diffusion, one token a pass, the whole canvas read anew in each: exact, and the slowest.
- `steps`: diffusion in `benchmark.steps` passes over the whole canvas.
- `prefix`, `dual`: block after block of `benchmark.block_length`, all places of a block at once whose most likely token
  has the probability `benchmark.threshold`, with an approximate cache of what stands before, or around.
- `blocks`: the same for a model trained in blocks, whose cache is exact.
- `agreement`: as `dual`, but as many drafted tokens as the model itself, read for next tokens, agrees with.

Texts do not stop before `benchmark.length`, so that all are of one length. The first token is what one waits for to see
anything; a pass is a call of the model, one that only fills a cache included; positions say how much passes read.
With random weights no token is ever sure, and `prefix`, `dual`, `blocks` and `agreement` go at one token a pass: what
passes cost is what such a table shows, a trained model says how many there are.

With `benchmark.judge` a second table says what the speed was paid with: `benchmark.samples` texts of each decoding,
their −log p under that one next-token model, and the entropy of their tokens and pairs of tokens. Texts that are worse
have more of the first; texts that repeat themselves have less of both.

On a CPU the memory is what the process holds at most, on CUDA what is allocated; both include the weights.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.specs import Decoding, InferenceBenchmarkSpec
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.evaluation.likelihood import score_documents
from transformerlm.inference.denoising import Denoiser
from transformerlm.inference.diffusion import denoise
from transformerlm.inference.generation import generate
from transformerlm.inference.specs import DenoisingSpec
from transformerlm.models.build import create_model
from transformerlm.models.files import Checkpoint, load_checkpoint
from transformerlm.models.sizes import flops_per_token
from transformerlm.models.specs import Reading, TransformerSpec
from transformerlm.models.transformer import Transformer
from transformerlm.tokenizer.text_ids import checked_mask_id, ids_without_text
from transformerlm.utils.dtypes import resolve_device, resolve_dtype

PERCENTILES = (50, 90, 99)

Texts = list[list[int]]
"""New ids of each row."""


@dataclass(frozen=True)
class Subject:
    """The weights, and how they may be read. Ids of special tokens are arbitrary where the weights are."""

    model: Transformer
    reading: Reading
    eot_id: int
    mask_id: int
    forbidden: torch.Tensor
    """bool [vocab_size]: ids that are never written."""
    is_random: bool

    def denoiser(self, block_size: int) -> Denoiser:
        return Denoiser(self.model, self.mask_id, self.forbidden, self.reading.alignment, block_size)


@dataclass(frozen=True)
class Run:
    """One batch of texts."""

    first: float
    """Seconds to the first token of any text."""
    seconds: float
    forwards: int
    positions: int
    """Read by the model, of each text."""
    steps: list[int]
    """Tokens written at each event, in all texts."""
    confidences: list[float]
    texts: Texts


Decode = Callable[[int, int, bool], Iterator[tuple[list[tuple[int, int, int]], list[float]]]]
"""From the number of texts, a seed, and whether texts may end, to events: (row, place, token) each, and confidences."""


def benchmark(spec: InferenceBenchmarkSpec, model: TransformerSpec) -> None:
    """Measure what `spec` asks for and print it; `model` is what random weights are made for."""
    subject = load_subject(spec, model)
    judge = load_judge(spec, subject) if spec.judge else None
    length = checked_length(spec, subject.model.spec.context_length)
    decoders = create_decoders(spec, subject, length)
    print(describe(spec, subject, length))
    results: list[dict[str, Any]] = []
    for batch_size in spec.batch_sizes:
        rows = measure_batch(spec, subject, decoders, batch_size)
        print(f"\nbatch of {batch_size}\n" + table(rows, SPEED_COLUMNS))
        results += rows
    qualities = [judged(spec, subject, judge, name, decode) for name, decode in decoders.items()] if judge else []
    if qualities:
        print(f"\n{spec.samples} texts under {spec.judge}\n" + table(qualities, QUALITY_COLUMNS))
    machine = {"device": str(subject.model.embedding.weight.device), "processor": platform.processor(),
               "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    settings = {"benchmark": asdict(spec), "model": asdict(subject.model.spec)}
    print(json.dumps({"machine": machine, "settings": settings, "speed": results, "quality": qualities}))


# -- what is measured --------------------------------------------------------------------------------------------------


def load_subject(spec: InferenceBenchmarkSpec, model: TransformerSpec) -> Subject:
    device, dtype = resolve_device(spec.device), resolve_dtype(spec.precision)
    if spec.checkpoint:
        checkpoint = load_checkpoint(spec.checkpoint, weights=spec.weights, device=device)
        tokenizer = checkpoint.tokenizer
        forbidden = torch.from_numpy(ids_without_text(tokenizer)).to(device)
        mask_id = checked_mask_id(tokenizer) if "diffusion" in checkpoint.reading.modes else -1
        return Subject(checkpoint.model.to(dtype), checkpoint.reading, tokenizer.eot_id, mask_id, forbidden, False)
    weights = create_model(model, vocab_size=spec.vocab_size, seed=spec.seed, device=device).to(dtype).eval()
    mask_id = spec.vocab_size - 1
    forbidden = torch.arange(spec.vocab_size, device=device) == mask_id
    return Subject(weights, Reading(modes=("ar", "diffusion"), alignment="in_place"), 0, mask_id, forbidden, True)


def load_judge(spec: InferenceBenchmarkSpec, subject: Subject) -> Checkpoint:
    if subject.is_random:
        raise UserError("benchmark.judge compares texts, and random weights write none: name a checkpoint", EXIT_USAGE)
    judge = load_checkpoint(spec.judge, device=resolve_device(spec.device))
    if "ar" not in judge.reading.modes:
        raise UserError(f"benchmark.judge = {spec.judge} was not trained for next tokens; name another", EXIT_USAGE)
    own = load_checkpoint(spec.checkpoint).tokenizer
    if judge.tokenizer.vocabulary != own.vocabulary:
        raise UserError(
            f"benchmark.judge = {spec.judge} has another tokenizer than {spec.checkpoint}; name one with the same",
            EXIT_USAGE,
        )
    return judge


def checked_length(spec: InferenceBenchmarkSpec, context_length: int) -> int:
    """New tokens of each text; an end-of-text token stands before them."""
    if spec.length >= context_length:
        raise UserError(
            f"benchmark.length ({spec.length}) must be below the model's context of {context_length}; 0 fills it",
            EXIT_USAGE,
        )
    return spec.length or context_length - 1


def create_decoders(spec: InferenceBenchmarkSpec, subject: Subject, length: int) -> dict[Decoding, Decode]:
    """What is asked for and the weights can do."""
    modes, blocks = subject.reading.modes, subject.reading.block_size
    quick: Any = {"block_length": spec.block_length, "threshold": spec.threshold}
    diffusion: dict[Decoding, DenoisingSpec] = {
        "confidence": DenoisingSpec(),
        "steps": DenoisingSpec(steps=spec.steps or max(1, length // 4)),
        "prefix": DenoisingSpec(**quick, cache="prefix"),
        "dual": DenoisingSpec(**quick, cache="dual"),
        "blocks": DenoisingSpec(threshold=spec.threshold),
        "agreement": DenoisingSpec(
            agreement=spec.agreement, order="left_to_right", block_length=spec.block_length, cache="dual"
        ),
    }
    possible: set[Decoding] = {"ar"} if "ar" in modes else set()
    if "diffusion" in modes:
        possible |= {"blocks"} if blocks else {"confidence", "steps", "prefix", "dual"}
        possible |= {"confidence", "steps"}
        possible |= {"agreement"} if "ar" in modes else set()
    if subject.is_random:
        possible |= {"blocks"}
    if impossible := set(spec.decodings) - possible:
        raise UserError(
            f"benchmark.decodings: {', '.join(sorted(impossible))} is nothing that {spec.checkpoint} can do, which was "
            f"trained for {' and '.join(modes)} {f'in blocks of {blocks}' if blocks else 'without blocks'}; "
            f"choose from {', '.join(sorted(possible))}",
            EXIT_USAGE,
        )
    result: dict[Decoding, Decode] = {}
    if "ar" in possible:
        result["ar"] = partial(next_tokens, subject, length)
    for name, denoising in diffusion.items():
        block_size = spec.block_length if subject.is_random and name == "blocks" else blocks
        if name in possible:
            result[name] = partial(masked_tokens, subject, length, denoising, block_size)
    return {name: decode for name, decode in result.items() if not spec.decodings or name in spec.decodings}


def next_tokens(subject: Subject, length: int, count: int, seed: int, may_end: bool) -> Any:
    steps = generate(
        subject.model,
        [[subject.eot_id]] * count,
        max_new_tokens=length,
        seed=seed,
        stop_id=subject.eot_id if may_end else None,
        banned=subject.forbidden,
    )
    for place, ids in enumerate(steps):
        yield [(row, place, token) for row, token in enumerate(ids) if token is not None], []


def masked_tokens(
    subject: Subject, length: int, denoising: DenoisingSpec, block_size: int, count: int, seed: int, may_end: bool
) -> Any:
    canvas = torch.full((count, 1 + length), subject.mask_id, device=subject.model.embedding.weight.device)
    canvas[:, 0] = subject.eot_id
    steps = denoise(
        subject.denoiser(block_size),
        canvas,
        denoising=denoising,
        seed=seed,
        stop_id=subject.eot_id if may_end else None,
        judge=subject.model if denoising.agreement else None,
    )
    for step in steps:
        yield list(zip(step.rows, step.positions, step.tokens, strict=True)), step.confidences


def run(subject: Subject, decode: Decode, count: int, seed: int, *, may_end: bool = False) -> Run:
    """Write `count` texts."""
    placed: list[dict[int, int]] = [{} for _ in range(count)]
    steps: list[int] = []
    confidences: list[float] = []
    first = math.nan
    synchronize(subject)
    with counted(subject.model) as calls:
        start = time.perf_counter()
        for events, sure in decode(count, seed, may_end):
            if not steps:
                first = time.perf_counter() - start
            steps.append(len(events))
            confidences += sure
            for row, place, token in events:
                placed[row][place] = token
        synchronize(subject)
        seconds = time.perf_counter() - start
    texts = [[token for _, token in sorted(row.items())] for row in placed]
    return Run(first, seconds, len(calls), sum(calls), steps, confidences, texts)


@contextmanager
def counted(model: Transformer) -> Generator[list[int]]:
    """The positions of each call of the model's `forward`, which decoding calls by its name: no hook sees it."""
    calls: list[int] = []
    original = model.forward

    def forward(tokens: torch.Tensor, **options: Any) -> Any:
        calls.append(tokens.shape[1])
        return original(tokens, **options)

    model.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield calls
    finally:
        del model.forward


def synchronize(subject: Subject) -> None:
    device = subject.model.embedding.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_batch(
    spec: InferenceBenchmarkSpec, subject: Subject, decoders: Mapping[Decoding, Decode], batch_size: int
) -> list[dict[str, Any]]:
    """A row for each decoding; they take turns."""
    runs: dict[Decoding, list[Run]] = {name: [] for name in decoders}
    memory: dict[Decoding, float | None] = {}
    for repeat in range(spec.warmups + spec.repeats):
        for name, decode in decoders.items():
            reset_peak_memory(subject)
            done = run(subject, decode, batch_size, spec.seed + repeat)
            if repeat >= spec.warmups:
                runs[name].append(done)
            memory[name] = max(memory.get(name) or 0.0, peak_megabytes(subject) or 0.0) or None
    rows = [summary(name, batch_size, done, memory[name]) for name, done in runs.items()]
    reference = next((row["tokens_per_second"] for row in rows if row["decoding"] == "ar"), None)
    for row in rows:
        row["over_ar"] = row["tokens_per_second"] / reference if reference else None
    return rows


def summary(name: str, batch_size: int, runs: Sequence[Run], memory: float | None) -> dict[str, Any]:
    """Of repeated runs; passes, positions and tokens are those of one text."""
    seconds = [done.seconds for done in runs]
    tokens = sum(sum(done.steps) for done in runs)
    forwards = sum(done.forwards for done in runs) * batch_size
    together = [count / batch_size for done in runs for count in done.steps]
    confidences = [value for done in runs for value in done.confidences]
    return {
        "decoding": name,
        "batch_size": batch_size,
        "first_token": spread([done.first for done in runs]),
        "seconds": spread(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "forwards_per_token": forwards / tokens,
        "tokens_per_forward": tokens / forwards,
        "positions_per_token": sum(done.positions for done in runs) * batch_size / tokens,
        "tokens_per_step": spread(together),
        "confidence": statistics.fmean(confidences) if confidences else None,
        "peak_megabytes": memory,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and percentiles."""
    percentiles = np.percentile(values, PERCENTILES).tolist()
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation} | {
        f"p{name}": value for name, value in zip(PERCENTILES, percentiles, strict=True)
    }


def reset_peak_memory(subject: Subject) -> None:
    device = subject.model.embedding.weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5", encoding="ascii")  # Linux: the peak begins anew at what is held now


def peak_megabytes(subject: Subject) -> float | None:
    device = subject.model.embedding.weight.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


# -- quality -----------------------------------------------------------------------------------------------------------


def judged(
    spec: InferenceBenchmarkSpec, subject: Subject, judge: Checkpoint, name: str, decode: Decode
) -> dict[str, Any]:
    """Samples that end where the model ends them, and what the judge thinks of them."""
    texts: Texts = []
    for start in range(0, spec.samples, max(spec.batch_sizes)):
        count = min(max(spec.batch_sizes), spec.samples - start)
        texts += run(subject, decode, count, spec.seed + start, may_end=True).texts
    ended = [text[: text.index(subject.eot_id) + 1] if subject.eot_id in text else text for text in texts]
    scores = score_documents(
        judge.model,
        [np.array(text, np.int64) for text in ended],
        judge.tokenizer.byte_lengths(),
        eot_id=subject.eot_id,
        context_length=judge.model.spec.context_length,
    )
    per_token = scores.nats / scores.tokens
    return {
        "decoding": name,
        "nats_per_token": scores.loss,
        "standard_error": float(per_token.std(ddof=1) / math.sqrt(len(ended))) if len(ended) > 1 else math.nan,
        "token_entropy": entropy(token for text in ended for token in text),
        "pair_entropy": entropy(pair for text in ended for pair in pairwise(text)),
        "tokens_per_text": statistics.fmean(map(len, ended)),
    }


def entropy(items: Iterator[Any]) -> float:
    """Of the frequencies, in nats."""
    counts = Counter(items)
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


# -- what is printed ---------------------------------------------------------------------------------------------------

Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]

SPEED_COLUMNS: Columns = {
    "decoding": lambda row: row["decoding"],
    "first ms": lambda row: f"{row['first_token']['p50'] * 1e3:.1f}",
    "all ms: mean": lambda row: f"{row['seconds']['mean'] * 1e3:.1f}",
    "± dev.": lambda row: f"{row['seconds']['deviation'] * 1e3:.1f}",
    "p50": lambda row: f"{row['seconds']['p50'] * 1e3:.1f}",
    "p90": lambda row: f"{row['seconds']['p90'] * 1e3:.1f}",
    "p99": lambda row: f"{row['seconds']['p99'] * 1e3:.1f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "× ar": lambda row: "" if row["over_ar"] is None else f"{row['over_ar']:.2f}",
    "passes/token": lambda row: f"{row['forwards_per_token']:.3f}",
    "tokens/pass": lambda row: f"{row['tokens_per_forward']:.2f}",
    "positions/token": lambda row: f"{row['positions_per_token']:.1f}",
    "confidence": lambda row: "" if row["confidence"] is None else f"{row['confidence']:.3f}",
    "peak MB": lambda row: "" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}",
}
QUALITY_COLUMNS: Columns = {
    "decoding": lambda row: row["decoding"],
    "nats/token": lambda row: f"{row['nats_per_token']:.3f}",
    "± error": lambda row: f"{row['standard_error']:.3f}",
    "entropy of tokens": lambda row: f"{row['token_entropy']:.3f}",
    "of pairs": lambda row: f"{row['pair_entropy']:.3f}",
    "tokens/text": lambda row: f"{row['tokens_per_text']:.1f}",
}


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def describe(spec: InferenceBenchmarkSpec, subject: Subject, length: int) -> str:
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    megaflops = flops_per_token(subject.model.spec, subject.model.vocab_size) / 3 / 1e6
    return (
        f"{spec.checkpoint or 'random weights'}: {parameters / 1e6:.2f}M parameters, {megaflops:.1f} MFLOP a position, "
        f"{spec.precision} on {subject.model.embedding.weight.device}, {torch.get_num_threads()} of {os.cpu_count()} "
        f"cores; texts of {length} tokens, {spec.repeats} runs after {spec.warmups} to warm up"
    )
