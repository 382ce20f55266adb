"""`transformerlm-train-tokenizer`: a byte-level BPE tokenizer from text."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import TrainTokenizerConfig
from trainkit.errors import UserError
from transformerlm.tokenizer.specs import TokenizerTrainingSpec

if TYPE_CHECKING:
    from transformerlm.tokenizer.tokenizer import Tokenizer

QUIET_SECONDS = 2.0
REFRESH_SECONDS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[TrainTokenizerConfig], arguments: argparse.Namespace) -> None:
    from cli.corpora import open_documents
    from transformerlm.tokenizer.trainer import wanted_merges

    config = loaded.config
    wanted_merges(config.tokenizer)  # refuses settings that cannot be met, before anything is made
    directory = Path(config.output.dir)
    check_output(directory, replace=arguments.force)
    tokenizer, about = train_on_documents(open_documents(config.corpus, "train"), config.tokenizer)
    tokenizer.save(directory, replace=arguments.force, about=about)
    corpus = about["corpus"]
    print(
        f"{directory}: {tokenizer.vocab_size:,} ids ({len(tokenizer.vocabulary.merges):,} merges) from "
        f"{corpus['documents']:,} documents ({corpus['bytes'] / 1e6:,.1f} MB) in {about['seconds']:.1f} s"
    )
    if tokenizer.vocab_size < config.tokenizer.vocab_size:
        wanted = f"tokenizer.vocab_size = {config.tokenizer.vocab_size:,}"
        print(f"{wanted} is not reached: the corpus yields no more than {len(tokenizer.vocabulary.merges):,} merges")
    if about["dropped_words"]:
        share = f"{about['dropped_words']:,} occurrences of rare words were left out"
        print(f"max_words = {config.tokenizer.max_words:,} words were kept at most; {share}")
    print(f"next: uv run transformerlm-make-data tokenizer.path={directory}, with the same [corpus]")


def train_on_documents(documents: Iterable[str], spec: TokenizerTrainingSpec) -> tuple[Tokenizer, dict[str, Any]]:
    """Train with progress on the terminal; also returns what the manifest should say about the training."""
    import dataclasses
    import time
    from datetime import UTC, datetime

    from transformerlm.tokenizer.trainer import train_tokenizer, wanted_merges

    corpus = _Measured(documents)
    began = time.monotonic()
    dropped = 0
    with shown_progress(wanted_merges(spec)) as show:

        def progress(stage: str, done: int) -> None:
            nonlocal dropped
            if stage == "dropped":
                dropped = done
            else:
                show(stage, done)

        tokenizer = train_tokenizer(corpus, spec, progress=progress)
    about = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 3),
        "training": dataclasses.asdict(spec),
        "dropped_words": dropped,
        "corpus": {"documents": corpus.documents, "bytes": corpus.bytes, "sha256": corpus.hexdigest()},
    }
    return tokenizer, about


def check_output(directory: Path, *, replace: bool) -> None:
    """Find out before the work, not after it, that its result has no place."""
    from trainkit.artifacts import make_directory, require_replaceable

    if directory.exists() and not replace:
        raise UserError(f"{directory} exists already; choose another output.dir, or replace it with --force")
    require_replaceable(directory, kind="tokenizer")
    make_directory(directory.parent)
    if not os.access(directory.parent, os.W_OK):
        raise UserError(f"{directory.parent} is not writable; choose another output.dir")


class _Measured:
    """Documents that are counted, measured and hashed as they pass."""

    def __init__(self, documents: Iterable[str]) -> None:
        import hashlib

        self._source = documents
        self._digest = hashlib.sha256()
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._source:
            data = document.encode("utf-8", "surrogatepass")
            self.documents += 1
            self.bytes += len(data)
            self._digest.update(b"%d\n" % len(data))  # so that where a document ends counts too
            self._digest.update(data)
            yield document

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def shown_progress(num_merges: int) -> Generator[Callable[[str, int], None]]:
    """A progress callback for the trainer; a terminal shows it when the work takes longer than two seconds."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True)
    tasks = {
        "count": bars.add_task("documents read", total=None),
        "merge": bars.add_task("merges learned", total=num_merges),
    }
    next_refresh = time.monotonic() + QUIET_SECONDS

    def progress(stage: str, done: int) -> None:
        nonlocal next_refresh
        now = time.monotonic()
        if console.is_terminal and now >= next_refresh:
            bars.start()
            bars.update(tasks[stage], completed=done)
            next_refresh = now + REFRESH_SECONDS

    try:
        yield progress
    finally:
        if bars.live.is_started:  # else it would write an empty line
            bars.stop()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a tokenizer that exists")


COMMAND = Command(
    name="transformerlm-train-tokenizer",
    summary="Train a byte-level BPE tokenizer on the training split of a corpus and write it as a folder "
    "that GPT-2's tools, Hugging Face tokenizers and tiktoken can read too.",
    schema=TrainTokenizerConfig,
    default_config="train_tokenizer",
    run=run,
    examples=(
        "",
        "corpus.kind=files 'corpus.train_paths=[\"stories.txt\"]' --vocab-size 4096 --output data/my-tokenizer",
        "--config my_tokenizer.toml --force",
    ),
    useful=("tokenizer.vocab_size", "tokenizer.special_tokens", "output.dir"),
    flags={"--vocab-size": "tokenizer.vocab_size", "--output": "output.dir"},
    add_arguments=_add_arguments,
)


if __name__ == "__main__":
    raise SystemExit(main())
