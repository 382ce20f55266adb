"""`transformerlm-make-data`: token files from text and a tokenizer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.common import Command, counted, run_command
from config.loading import Loaded
from config.schemas import MakeDataConfig
from trainkit.errors import EXIT_INTERRUPTED, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from trainkit.data.splits import Split

QUIET_SECONDS = 2.0
"""Work that is shorter than this shows no progress."""
LINE_SECONDS = 30.0
"""Time between two lines of progress where there is no terminal."""


class ProgressLine:
    """Counts on stderr once work takes a while: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = time.monotonic()
        self._first: int | None = None
        self._next = self._start + QUIET_SECONDS
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def __call__(self, documents: int, tokens: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = tokens  # a build that goes on begins with what it has
            if documents:
                print(f"{self._label}: going on after {counted(documents, 'document')}", file=sys.stderr, flush=True)
            return
        if now < self._next:
            return
        self._next = now + (0.2 if self._terminal else LINE_SECONDS)
        rate = (tokens - self._first) / (now - self._start)
        text = f"{self._label}: {counted(documents, 'document')}, {tokens:,} tokens, {rate:,.0f} tokens/s"
        print(
            f"\r\x1b[K{text}" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
        self._shown = True

    def close(self) -> None:
        if self._shown and self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _run(loaded: Loaded[MakeDataConfig], arguments: argparse.Namespace) -> None:
    config = loaded.config
    prefixes: dict[Split, str] = {
        "train": config.output.train_prefix,
        "val": config.output.val_prefix,
        "test": config.output.test_prefix,
    }
    named = [prefix for prefix in prefixes.values() if prefix]
    if twice := [prefix for prefix in named if named.count(prefix) > 1]:
        raise UserError(f"two of output.train_prefix, val_prefix and test_prefix are {twice[0]}; name two", EXIT_USAGE)
    if arguments.workers < 0:
        raise UserError("--workers must be at least 0", EXIT_USAGE)
    from cli.corpora import has_split
    from cli.token_files import build_token_files

    wanted: dict[Split, str] = {
        split: prefix for split, prefix in prefixes.items() if prefix and has_split(config.corpus, split)
    }
    if arguments.verify:
        _verify(list(wanted.values()))
        return
    from transformerlm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.tokenizer.path)
    for split, prefix in wanted.items():
        line = ProgressLine(prefix)
        start = time.monotonic()
        try:
            made = build_token_files(
                config.corpus,
                split,
                tokenizer,
                prefix,
                dtype=config.output.dtype,
                force=arguments.force,
                workers=arguments.workers,
                progress=line,
            )
        except KeyboardInterrupt:
            how = "without --force" if arguments.force else "again"
            raise UserError(f"interrupted; the same command {how} goes on from here", EXIT_INTERRUPTED) from None
        finally:
            line.close()
        what = "up to date" if made.reused else f"made in {time.monotonic() - start:.1f} s"
        facts = made.manifest
        documents = counted(facts.documents, "document")
        print(f"{prefix}: {facts.tokens:,} tokens in {documents}, {facts.dtype}, {what}", flush=True)
        if empty := facts.source.get("empty_documents_left_out"):
            print(f"{prefix}: left out {counted(empty, 'empty document')}", flush=True)
    if "val" not in wanted:
        print("no validation files were made: [corpus] or output.val_prefix names none", flush=True)


def _verify(prefixes: Sequence[str]) -> None:
    """Check the files of all prefixes, and tell of builds beside them that are not done."""
    from trainkit.data.megatron import idx_path, verify_all
    from trainkit.data.megatron_writer import is_unfinished

    unfinished = [prefix for prefix in prefixes if is_unfinished(prefix)]
    for prefix in unfinished:
        print(f"{prefix}: a build is unfinished; the same command without --verify goes on", file=sys.stderr)
    made = [prefix for prefix in prefixes if prefix not in unfinished or idx_path(prefix).exists()]
    for prefix, manifest in zip(made, verify_all(made), strict=True):
        print(f"{prefix}: {manifest.tokens:,} tokens, intact")
    if len(made) < len(prefixes):
        raise UserError("files are missing that a build has not finished")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="make the files again, from the beginning, even if they match"
    )
    parser.add_argument("--verify", action="store_true", help="only check the files against their SHA-256")
    parser.add_argument("--workers", type=int, default=0, help="processes that encode; 0 = as many as are worth it")


COMMAND = Command(
    name="transformerlm-make-data",
    summary="Encode text with a tokenizer into token files in Megatron-LM's layout. Files that match the text, the "
    "tokenizer and the settings are left as they are; a build that was stopped goes on where it was.",
    schema=MakeDataConfig,
    default_config="make_data",
    run=_run,
    examples=(
        "",
        "tokenizer.path=data/tokenizer corpus.num_train_stories=1000",
        "corpus.kind=files 'corpus.train_paths=[\"train.jsonl\"]' 'corpus.val_paths=[\"val.txt\"]'",
        "--verify",
    ),
    useful=("tokenizer.path", "output.train_prefix", "output.val_prefix", "output.test_prefix", "output.dtype"),
    flags={"--tokenizer": "tokenizer.path"},
    add_arguments=_add_arguments,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


if __name__ == "__main__":
    raise SystemExit(main())
