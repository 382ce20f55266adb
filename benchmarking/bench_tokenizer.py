"""The tokenizer beside every installed peer: the same texts, taken in turns, ids compared, ratios printed, JSON last.

    uv run transformerlm-bench-tokenizer
    uv run transformerlm-bench-tokenizer 'benchmark.files=["corpus.txt"]' benchmark.megabytes=20

Speeds are of one thread and counted in processor time, which a busy machine disturbs less than the clock does; what
runs on several threads is timed by the clock. `warm` means that the words of the text have been seen, `cold` that the
encoder is new. Peers take part where they are installed (tiktoken, tokenizers, gigatoken, rustbpe); none is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from config.specs import TokenizerBenchmarkSpec
from trainkit.errors import UserError
from transformerlm.tokenizer import readiness
from transformerlm.tokenizer.pretokenizer import PATTERNS
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

OURS = "transformerlm"
SHORT_TEXT = "Once upon a time, a "
SHORT_CALLS = 2000
SOURCES = (".py", ".md", ".rst", ".txt", ".h", ".c", ".html", ".js")

Encode: TypeAlias = Callable[[str], Any]
"""From text to ids, as fast as the peer does it when it is used from Python."""
Results: TypeAlias = dict[str, dict[str, float]]
"""What was measured, then for each tokenizer: megabytes a second, microseconds or seconds."""


@dataclass
class Report:
    results: Results = field(default_factory=dict[str, dict[str, float]])
    different: list[str] = field(default_factory=list[str])
    """Which peers gave other ids, and where."""

    def add(self, what: str, unit: str, values: Mapping[str, float], more_is_better: bool = True) -> None:
        self.results[f"{what} [{unit}]"] = dict(values)
        print(f"\n{what} [{unit}]")
        for name, value in values.items():
            ratio = values[OURS] / value if more_is_better else value / values[OURS]
            print(f"  {name:15s} {value:12.4g}" + (f"   ours: {ratio:.2f}×" if name != OURS else ""))


def benchmark(spec: TokenizerBenchmarkSpec) -> None:
    """Run everything that `spec` asks for and print it."""
    # Peers read these when they are imported. One thread each, until threads are what is measured.
    os.environ["RAYON_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    for name in ("compiled_encoder", "compiled_trainer"):
        readiness.load(name)
    report = Report()
    corpora = dict(read_corpora(spec))
    if not corpora:
        raise UserError("there is no text to measure on; name some in benchmark.files, or set benchmark.grammar")
    tokenizer = subject(spec, corpora)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "tokenizer"
        tokenizer.save(directory)
        makers = encoders(tokenizer, directory)
        for name, text in corpora.items():
            encoding_speed(report, name, text, makers, spec.repeats)
        text = next(iter(corpora.values()))
        short_calls(report, makers, spec.repeats)
        decoding_speed(report, tokenizer, directory, text, spec.repeats)
        thread_speed(report, tokenizer, text, spec.repeats)
        for name, text in corpora.items():
            training_time(report, name, text, spec)
        if spec.memory and Path("/proc/self/status").exists():
            training_memory(report, text, spec.vocab_size)
        start_up(report, directory, spec.repeats)
    print("\nids differ: " + ("; ".join(report.different) or "nowhere"))
    machine = {"processor": processor(), "python": platform.python_version(), "cores": os.cpu_count()}
    print(json.dumps({"machine": machine, "results": report.results, "different": report.different}))


# -- what is encoded ---------------------------------------------------------------------------------------------------


def read_corpora(spec: TokenizerBenchmarkSpec) -> Iterator[tuple[str, str]]:
    size = int(spec.megabytes * 1e6)
    if spec.grammar:
        from transformerlm.corpus.stories import sample

        yield "stories", text_of((sample(0, index) for index in range(10**9)), min(size, 4_000_000))
    for path in map(Path, spec.files):
        try:
            yield path.name, path.read_text(encoding="utf-8", errors="replace")[:size]
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name another file in benchmark.files") from error
    if spec.machine:
        yield "machine", text_of(machine_texts(), size)


def text_of(texts: Iterable[str], size: int) -> str:
    parts: list[str] = []
    so_far = 0
    for text in texts:
        parts.append(text)
        so_far += len(text)
        if so_far >= size:
            break
    return "\n".join(parts)[:size]


def machine_texts() -> Iterator[str]:
    """Sources and documentation of installed packages: text that does not repeat itself."""
    for root in sorted({Path(place) for place in sys.path if Path(place).name == "site-packages"}):
        for path in sorted(root.rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                try:
                    yield path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue


def subject(spec: TokenizerBenchmarkSpec, corpora: Mapping[str, str]) -> Tokenizer:
    if spec.tokenizer:
        return Tokenizer.load(spec.tokenizer)
    return train_tokenizer(corpora.values(), TokenizerTrainingSpec(vocab_size=spec.vocab_size, allow_smaller=True))


# -- encoding ----------------------------------------------------------------------------------------------------------


def encoders(tokenizer: Tokenizer, directory: Path) -> dict[str, Callable[[], Encode]]:
    """For each tokenizer a function that makes a new encoder."""
    makers: dict[str, Callable[[], Encode]] = {
        OURS: lambda: partial(Tokenizer(tokenizer.vocabulary).encode, allowed_special="none")
    }
    if tiktoken := installed("tiktoken"):
        makers["tiktoken"] = lambda: (
            tiktoken.Encoding(
                name="benchmark",
                pat_str=PATTERNS[tokenizer.vocabulary.pattern],
                mergeable_ranks=dict(tokenizer.vocabulary.tokens),
                special_tokens={},
            ).encode_ordinary
        )
    if gigatoken := installed("gigatoken"):
        makers["gigatoken"] = lambda: gigatoken.Tokenizer(str(directory / "tokenizer.json")).encode
    if tokenizers := installed("tokenizers"):
        makers["tokenizers"] = partial(encode_with_tokenizers, tokenizers, directory / "tokenizer.json")
    return makers


def encode_with_tokenizers(tokenizers: Any, path: Path) -> Encode:
    encoder = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: encoder.encode(text, add_special_tokens=False).ids


def encoding_speed(
    report: Report, name: str, text: str, makers: Mapping[str, Callable[[], Encode]], repeats: int
) -> None:
    megabytes = len(text.encode()) / 1e6
    expected = np.asarray(makers[OURS]()(text))
    cold: dict[str, list[float]] = {peer: [] for peer in makers}
    warm: dict[str, list[float]] = {peer: [] for peer in makers}
    for _ in range(repeats):
        for peer, make in makers.items():
            encode = make()
            encode(SHORT_TEXT * 50)  # what is set up once does not count
            cold[peer].append(processor_seconds(partial(encode, text)))
            ids: Any = None
            if peer in ("tokenizers", "tiktoken"):  # they remember no words, so one run shows both
                warm[peer] = cold[peer]
            else:
                warm[peer].append(statistics.median(processor_seconds(partial(encode, text)) for _ in range(3)))
            if len(cold[peer]) == 1:
                ids = np.asarray(encode(text))
                if not np.array_equal(ids, expected):
                    report.different.append(f"{peer} on {name}")
    for kind, seconds in (("cold", cold), ("warm", warm)):
        speeds = {peer: megabytes / statistics.median(values) for peer, values in seconds.items()}
        report.add(f"encode {name}, {megabytes:.1f} MB, {kind}, one thread", "MB/s", speeds)


def short_calls(report: Report, makers: Mapping[str, Callable[[], Encode]], repeats: int) -> None:
    microseconds: dict[str, list[float]] = {peer: [] for peer in makers}
    ready = {peer: make() for peer, make in makers.items()}
    for _ in range(2 * repeats + 1):
        for peer, encode in ready.items():
            encode(SHORT_TEXT)
            seconds = processor_seconds(lambda encode=encode: [encode(SHORT_TEXT) for _ in range(SHORT_CALLS)])
            microseconds[peer].append(seconds / SHORT_CALLS * 1e6)
    report.add("a call of 20 characters", "µs", medians(microseconds), more_is_better=False)


def decoding_speed(report: Report, tokenizer: Tokenizer, directory: Path, text: str, repeats: int) -> None:
    ids = tokenizer.encode(text, allowed_special="none")
    as_list = ids.tolist()
    decoders: dict[str, Callable[[], Any]] = {OURS: lambda: tokenizer.decode(ids)}
    if tiktoken := installed("tiktoken"):
        ranks = dict(tokenizer.vocabulary.tokens)
        encoding = tiktoken.Encoding(name="b", pat_str="a", mergeable_ranks=ranks, special_tokens={})
        decoders["tiktoken"] = lambda: encoding.decode(as_list)
    if gigatoken := installed("gigatoken"):
        peer = gigatoken.Tokenizer(str(directory / "tokenizer.json"))
        as_numbers = ids.astype(np.uint32)
        decoders["gigatoken"] = lambda: peer.decode(as_numbers)
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        for name, decode in decoders.items():
            speeds[name].append(len(text) / 1e6 / processor_seconds(decode))
    report.add("decode", "MB/s", medians(speeds))


def thread_speed(report: Report, tokenizer: Tokenizer, text: str, repeats: int) -> None:
    """By the clock: how much sooner several threads are done."""
    counts = sorted({1, 2, os.cpu_count() or 1})
    seconds: dict[int, list[float]] = {threads: [] for threads in counts}
    long_text = text * max(1, 20_000_000 // len(text))
    for _ in range(repeats + 1):
        for threads in counts:
            start = time.perf_counter()
            tokenizer.encode(long_text, threads=threads)
            seconds[threads].append(time.perf_counter() - start)
    one = statistics.median(seconds[1][1:])
    speedups = {f"{threads} threads": one / statistics.median(values[1:]) for threads, values in seconds.items()}
    report.results["speed-up by threads"] = speedups
    print("\nspeed-up by threads: " + ", ".join(f"{name} {value:.2f}×" for name, value in speedups.items()))


# -- training ----------------------------------------------------------------------------------------------------------


def training_time(report: Report, name: str, text: str, spec: TokenizerBenchmarkSpec) -> None:
    trainers = {OURS: partial(train_with_ours, text, spec.vocab_size)}
    if gigatoken := installed("gigatoken"):
        trainers["gigatoken"] = partial(gigatoken.train_bpe, text.encode(), spec.vocab_size, ["<|endoftext|>"])
    if rustbpe := installed("rustbpe"):
        trainers["rustbpe"] = partial(train_with_rustbpe, rustbpe, text, spec.vocab_size)
    if tokenizers := installed("tokenizers"):
        trainers["tokenizers"] = partial(train_with_tokenizers, tokenizers, text, spec.vocab_size)
    seconds: dict[str, list[float]] = {peer: [] for peer in trainers}
    for _ in range(spec.training_repeats):
        for peer, train in trainers.items():
            seconds[peer].append(processor_seconds(train))
    megabytes = len(text.encode()) / 1e6
    what = f"train on {name}, {megabytes:.1f} MB, {spec.vocab_size} ids, one thread"
    report.add(what, "s", medians(seconds), more_is_better=False)


def train_with_ours(text: str, vocab_size: int) -> None:
    spec = TokenizerTrainingSpec(vocab_size=vocab_size, special_tokens=("<|endoftext|>",), allow_smaller=True)
    train_tokenizer([text], spec, threads=1)


def train_with_rustbpe(rustbpe: Any, text: str, vocab_size: int) -> None:
    rustbpe.Tokenizer().train_from_iterator([text], vocab_size - 1, pattern=PATTERNS["gpt2"])


def train_with_tokenizers(tokenizers: Any, text: str, vocab_size: int) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    # In lines, which it prefers by far to one long text.
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)


MEMORY_OF = {
    OURS: "from benchmarking.bench_tokenizer import train_with_ours as t; t(text, size)",
    "gigatoken": "import gigatoken; gigatoken.train_bpe(text.encode(), size, ['<|endoftext|>'])",
}


def training_memory(report: Report, text: str, vocab_size: int) -> None:
    """The largest memory of a process that reads the text, trains, and does nothing else."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        read = f"text = open({file.name!r}, encoding='utf-8').read(); size = {vocab_size}\n"
        peaks: dict[str, float] = {}
        for peer, train in MEMORY_OF.items():
            if peer == OURS or installed(peer):
                peaks[peer] = peak_megabytes(read + train)
    report.add("training, largest memory of the process", "MB", peaks, more_is_better=False)


def peak_megabytes(code: str) -> float:
    # Not `getrusage`, whose maximum begins with the memory of the process that started this one.
    code += "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    return int(run_python(code).split()[-2]) / 1e3


# -- start-up ----------------------------------------------------------------------------------------------------------


def start_up(report: Report, directory: Path, repeats: int) -> None:
    """A new process: `import numba`; the same up to the first long text encoded; and up to the first short one."""
    load = f"from transformerlm.tokenizer.tokenizer import Tokenizer; t = Tokenizer.load({str(directory)!r})\n"
    programs = {
        "import numba": "import numba",
        "first long text": load + "t.encode('Once upon a time. ' * 200_000)",
        "first short text": load + "t.encode('Once upon a time.')",
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(2 * repeats + 1):
        for name, code in programs.items():
            timed = f"import time; start = time.process_time()\n{code}\nprint(time.process_time() - start)"
            seconds[name].append(float(run_python(timed).split()[-1]))
    values = medians(seconds)
    report.results["start-up [s]"] = values
    print("\nstart-up [s]: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


# -- helpers -----------------------------------------------------------------------------------------------------------


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def medians(values: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(numbers) for name, numbers in values.items()}


def run_python(code: str) -> str:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
