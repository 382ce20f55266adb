"""The tokenizer beside every installed peer: the same texts, taken in turns, ids compared, ratios printed, JSON last.

    uv run transformerlm-bench-tokenizer
    uv run transformerlm-bench-tokenizer 'benchmark.files=["corpus.txt"]' benchmark.megabytes=20
    uv run transformerlm-bench-tokenizer 'benchmark.files=["large.txt"]' benchmark.megabytes=100 \
        benchmark.grammar=false benchmark.machine=false 'benchmark.measure=["train", "memory"]'

What `benchmark.measure` names, all of it by default:

- `encode`: megabytes a second in one thread; `cold`: the encoder is new, knows no word; `warm`: it has seen the text.
- `calls`: microseconds for a call of 20 characters.
- `decode`: megabytes a second, of an array of ids.
- `threads`: how much sooner encoding and training are done with several threads than with one.
- `files`: `encode_files` from disk, with one thread and with all, beside gigatoken's.
- `train`: seconds in one thread, the text in memory.
- `memory`: the largest memory of a process that reads the text, trains, and does nothing else.
- `start`: a new process from the import to the first text encoded by the kernels, which are cached, as is the bytecode
  of every module; beside `import numba` alone.

One thread is counted in processor time, which a busy machine disturbs less than the clock does; what runs on several
threads, or reads files, is timed by the clock. Kernels are compiled or loaded before anything is timed.

Peers take part where they are installed, none is needed: tiktoken, tokenizers, gigatoken, rustbpe (trains only) and
sentencepiece, whose ids are not compared, because it works on characters and cannot take our vocabulary.
`tokenizer_peers.py` says how each is called.
"""

from __future__ import annotations

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

from benchmarking.tokenizer_peers import (
    OTHER_IDS,
    OURS,
    WITHOUT_MEMORY,
    Encode,
    encoders,
    installed,
    tiktoken_encoding,
    train_with_ours,
    trainers,
)
from config.specs import TokenizerBenchmarkSpec
from trainkit.errors import UserError
from transformerlm.tokenizer import readiness
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

SHORT_TEXT = "Once upon a time, a "
SHORT_CALLS = 2000
SOURCES = (".py", ".md", ".rst", ".txt", ".h", ".c", ".html", ".js")

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
        readiness.load(name).warm_up()
    report = Report()
    corpora = dict(read_corpora(spec))
    if not corpora:
        raise UserError("there is no text to measure on; name some in benchmark.files, or set benchmark.grammar")
    tokenizer = subject(spec, corpora)
    text = next(iter(corpora.values()))
    with tempfile.TemporaryDirectory() as folder:
        # New processes find the bytecode of modules cached, as it is wherever Python is installed in the usual way.
        os.environ["PYTHONDONTWRITEBYTECODE"] = ""
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "bytecode")
        directory = Path(folder) / "tokenizer"
        tokenizer.save(directory)
        makers = encoders(tokenizer, directory, text)
        for name, text_of_corpus in corpora.items() if "encode" in spec.measure else ():
            encoding_speed(report, name, text_of_corpus, makers, spec.repeats)
        for name, text_of_corpus in corpora.items() if "train" in spec.measure else ():
            training_time(report, name, text_of_corpus, spec)
        measurements: dict[str, Callable[[], None]] = {
            "calls": lambda: short_calls(report, tokenizer, makers, spec.repeats),
            "decode": lambda: decoding_speed(report, tokenizer, directory, text, spec.repeats),
            "threads": lambda: thread_speed(report, tokenizer, text, spec),
            "files": lambda: file_speed(report, tokenizer, directory, text, spec.repeats),
            "memory": lambda: training_memory(report, text, spec.vocab_size),
            "start": lambda: start_up(report, directory, spec.repeats),
        }
        for name, measure in measurements.items():
            if name in spec.measure:
                measure()
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
            if peer in WITHOUT_MEMORY:
                warm[peer] = cold[peer]
            else:
                warm[peer].append(statistics.median(processor_seconds(partial(encode, text)) for _ in range(3)))
            if len(cold[peer]) == 1 and peer not in OTHER_IDS:
                ids = np.asarray(encode(text))
                if not np.array_equal(ids, expected):
                    report.different.append(f"{peer} on {name}")
    for kind, seconds in (("cold", cold), ("warm", warm)):
        speeds = {peer: megabytes / statistics.median(values) for peer, values in seconds.items()}
        report.add(f"encode {name}, {megabytes:.1f} MB, {kind}, one thread", "MB/s", speeds)


def short_calls(report: Report, tokenizer: Tokenizer, makers: Mapping[str, Callable[[], Encode]], repeats: int) -> None:
    microseconds: dict[str, list[float]] = {peer: [] for peer in makers}
    ready = {peer: make() for peer, make in makers.items()}
    # Called as it stands, like the peers' methods: an argument bound by `partial` would be a twentieth of the time.
    ready[OURS] = Tokenizer(tokenizer.vocabulary).encode
    for _ in range(2 * repeats + 1):
        for peer, encode in ready.items():
            encode(SHORT_TEXT)
            seconds = processor_seconds(partial(call_often, encode))
            microseconds[peer].append(seconds / SHORT_CALLS * 1e6)
    report.add("a call of 20 characters", "µs", medians(microseconds), more_is_better=False)


def call_often(encode: Encode) -> None:
    """A result is dropped before the next call: 2,000 that are kept would measure the allocator."""
    for _ in range(SHORT_CALLS):
        encode(SHORT_TEXT)


def decoding_speed(report: Report, tokenizer: Tokenizer, directory: Path, text: str, repeats: int) -> None:
    ids = tokenizer.encode(text, allowed_special="none")
    as_list = ids.tolist()
    decoders: dict[str, Callable[[], Any]] = {OURS: lambda: tokenizer.decode(ids)}
    if tiktoken := installed("tiktoken"):
        encoding = tiktoken_encoding(tiktoken, tokenizer)
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


def thread_speed(report: Report, tokenizer: Tokenizer, text: str, spec: TokenizerBenchmarkSpec) -> None:
    """By the clock: how much sooner several threads are done."""
    long_text = text * max(1, 20_000_000 // len(text))
    data = long_text.encode()
    works: dict[str, Callable[[int], object]] = {
        "encode": lambda threads: tokenizer.encode(long_text, threads=threads),
        "train": lambda threads: train_with_ours(data, spec.vocab_size, threads),
    }
    counts = sorted({1, 2, os.cpu_count() or 1})
    for name, work in works.items():
        seconds: dict[int, list[float]] = {threads: [] for threads in counts}
        for _ in range(spec.repeats + 1):
            for threads in counts:
                seconds[threads].append(clock_seconds(partial(work, threads)))
        # The best of each: what else the machine does only ever adds to the time.
        speedups = {f"{threads} threads": min(seconds[1]) / min(values) for threads, values in seconds.items()}
        report.results[f"{name}, speed-up by threads"] = speedups
        print(f"\n{name}, {len(data) / 1e6:.0f} MB, speed-up by threads: " + in_a_row(speedups))


def file_speed(report: Report, tokenizer: Tokenizer, directory: Path, text: str, repeats: int) -> None:
    """By the clock: a file of at least 20 MB to ids, which are let go as they come."""
    path = directory.parent / "text"
    path.write_text(text * max(1, 20_000_000 // len(text)), encoding="utf-8", newline="")
    works: dict[str, Callable[[int], object]] = {
        OURS: lambda threads: sum(map(len, tokenizer.encode_files([path], allowed_special="none", threads=threads)))
    }
    if gigatoken := installed("gigatoken"):
        peer = gigatoken.Tokenizer(str(directory / "tokenizer.json"))
        source = gigatoken.TextFileSource([str(path)])
        works["gigatoken"] = lambda threads: peer.encode_files(source, parallel=threads != 1)
    for label, threads in (("one thread", 1), ("all threads", 0)):
        speeds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats + 1):
            for name, work in works.items():
                speeds[name].append(path.stat().st_size / 1e6 / clock_seconds(partial(work, threads)))
        report.add(f"encode_files, {label}", "MB/s", medians(speeds))


# -- training ----------------------------------------------------------------------------------------------------------


def training_time(report: Report, name: str, text: str, spec: TokenizerBenchmarkSpec) -> None:
    data = text.encode()
    ready = {peer: prepare() for peer, prepare in trainers(data, spec.vocab_size).items()}
    seconds: dict[str, list[float]] = {peer: [] for peer in ready}
    for _ in range(spec.training_repeats):
        for peer, train in ready.items():
            try:
                seconds[peer].append(processor_seconds(train))
            except RuntimeError as error:  # sentencepiece, of a text with more characters than ids
                print(f"\n{peer} cannot train on {name}: {error}")
    seconds = {peer: values for peer, values in seconds.items() if values}
    what = f"train on {name}, {len(data) / 1e6:.1f} MB, {spec.vocab_size} ids, one thread"
    report.add(what, "s", medians(seconds), more_is_better=False)


def training_memory(report: Report, text: str, vocab_size: int) -> None:
    if not Path("/proc/self/status").exists():
        print("\nmemory is measured on Linux only")
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        peaks: dict[str, float] = {}
        for peer in trainers(b"", vocab_size):
            code = (
                "from benchmarking.tokenizer_peers import trainers\n"
                f"trainers(open({file.name!r}, 'rb').read(), {vocab_size})[{peer!r}]()()"
            )
            peaks[peer] = min(peak_megabytes(code) for _ in range(2))  # the first one may write bytecode
    what = f"training on {len(text) / 1e6:.1f} MB, largest memory of the process"
    report.add(what, "MB", peaks, more_is_better=False)


def peak_megabytes(code: str) -> float:
    # Not `getrusage`, whose maximum begins with the memory of the process that started this one.
    code += "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    return int(run_python(code).split()[-2]) / 1e3


# -- start-up ----------------------------------------------------------------------------------------------------------


def start_up(report: Report, directory: Path, repeats: int) -> None:
    """New processes: `import numba`; to the first text encoded by the kernels; to the first short one."""
    load = f"from transformerlm.tokenizer.tokenizer import Tokenizer; t = Tokenizer.load({str(directory)!r})\n"
    size = readiness.LOADING_COST  # the shortest text for which the kernels are loaded
    programs = {
        "import numba": "import numba",
        "first text by kernels": load + f"t.encode('Once upon a time. ' * {size // 18 + 1})",
        "first short text": load + "t.encode('Once upon a time.')",
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(2 * repeats + 2):
        for name, code in programs.items():
            timed = f"import time; start = time.process_time()\n{code}\nprint(time.process_time() - start)"
            seconds[name].append(float(run_python(timed).split()[-1]))
    values = medians({name: times[1:] for name, times in seconds.items()})
    values["over import numba"] = values["first text by kernels"] - values["import numba"]
    report.results["start-up [s]"] = values
    print("\nstart-up [s]: " + in_a_row(values))


# -- helpers -----------------------------------------------------------------------------------------------------------


def processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def clock_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_a_row(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


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
