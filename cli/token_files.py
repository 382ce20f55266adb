"""Documents to token files on all cores: the work of `transformerlm-make-data` and of the pipeline's data stage.

The parent reads the text and writes the files, worker processes encode chunks of documents in between. Chunks come
back in order and only a few are under way at a time: the files do not depend on the number of workers, nor does memory
on the size of the corpus. Every few seconds what is done is saved: a build that was stopped or killed goes on there.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cli.corpora import find_commit, fingerprint, local_paths, num_stories, open_documents
from config.corpora import CorpusSpec, FilesCorpusSpec, GrammarCorpusSpec, HubCorpusSpec
from trainkit.data.megatron import IndexedTokens, bin_path, idx_path, smallest_dtype, verify
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.splits import Split
from trainkit.data.token_manifest import TokenManifest, manifest_path, read_manifest
from trainkit.errors import UserError
from transformerlm.tokenizer.tokenizer import Tokenizer

RECIPE = 1
"""Raise it when the same text and tokenizer would give other files, so that the old ones are made again."""
CHUNK_CHARACTERS = 1 << 18
CHUNK_STORIES = 256
WORTH_A_WORKER = 4_000_000
"""Bytes of text below which starting one more process costs more than it saves."""
SAVE_SECONDS = 2.0
"""Time between two points from which a build can go on."""
BYTES_PER_STORY = 800
"""A rough mean of the grammar's stories; decides only how many workers start."""

Progress = Callable[[int, int], None]
"""Called as `progress(documents, tokens)` with what has been written so far, first with what a stopped build left."""


def _silent(documents: int, tokens: int) -> None:
    del documents, tokens


@dataclass(frozen=True)
class Stories:
    """A chunk of grammar documents; they are sampled by the worker that encodes them."""

    seed: int
    indices: range


Chunk = list[str] | Stories


@dataclass(frozen=True)
class Encoded:
    """What a chunk of documents became: each that is not empty as its tokens and the token that ends it."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    text_bytes: int
    empty: int


@dataclass(frozen=True)
class TokenFiles:
    """The outcome of `build_token_files`."""

    manifest: TokenManifest
    reused: bool
    """The files were there already and match; nothing was written."""


def build_token_files(
    corpus: CorpusSpec,
    split: Split,
    tokenizer: Tokenizer,
    prefix: Path | str,
    *,
    dtype: str = "auto",
    force: bool = False,
    check: bool = False,
    workers: int = 0,
    progress: Progress = _silent,
) -> TokenFiles:
    """Make `PREFIX.bin`, `.idx` and `.json` of one split, unless files of the same text and tokenizer are there.

    What stands for "the same" is `cli.corpora.fingerprint` (for local files, the SHA-256 of each), the tokenizer's
    content hash and the dtype. `force` makes them again in any case, from the beginning; without it, a build of the
    same that was stopped is finished, and the files are those of one that was not. `check` compares files that would
    be reused with their SHA-256. Special tokens that stand in the text are plain characters: a document cannot end
    itself. `workers` = 0 takes as many processes as there are cores and the amount of text is worth.
    """
    prefix = Path(prefix)
    stored = _dtype(dtype, tokenizer.vocab_size)
    source = {
        "split": split,
        "corpus": dataclasses.asdict(corpus),
        "fingerprint": fingerprint(corpus, split),
        "recipe": RECIPE,
    }
    if not force and (manifest := _matching(prefix, stored, tokenizer.content_hash, source, check=check)):
        return TokenFiles(manifest, reused=True)
    workers = workers or min(available_cores(), 1 + _estimated_bytes(corpus, split) // WORTH_A_WORKER)
    with IndexedWriter(prefix, stored, tokenizer=tokenizer.content_hash, source=source, start_over=force) as writer:
        empty = writer.source.get("empty_documents_left_out", 0)
        # A build that goes on stays with the commit that it began with, whatever is the newest by now.
        if commit := writer.source.get("commit") or find_commit(corpus):
            writer.source["commit"] = commit
        chunks = _chunks(corpus, split, commit, Done(writer.documents + empty, writer.text_bytes))
        next_save = time.monotonic() + SAVE_SECONDS
        progress(writer.documents, writer.tokens)
        with closing(_encode_all(chunks, tokenizer, stored, workers)) as results:
            for encoded in results:
                writer.add(encoded.tokens, encoded.lengths, text_bytes=encoded.text_bytes)
                empty += encoded.empty
                writer.source["empty_documents_left_out"] = empty
                progress(writer.documents, writer.tokens)
                if time.monotonic() >= next_save:
                    writer.save()
                    next_save = time.monotonic() + SAVE_SECONDS
    manifest = read_manifest(prefix)
    assert manifest is not None
    return TokenFiles(manifest, reused=False)


def available_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(name: str, vocab_size: int) -> np.dtype[Any]:
    if name == "auto":
        return smallest_dtype(vocab_size)
    dtype = np.dtype(name)
    if vocab_size - 1 > np.iinfo(dtype.name).max:
        raise UserError(f"output.dtype {name} cannot hold the {vocab_size} ids of the tokenizer; take int32 or auto")
    return dtype


def _matching(
    prefix: Path, dtype: np.dtype[Any], tokenizer: str, source: dict[str, Any], *, check: bool
) -> TokenManifest | None:
    """The manifest of the files at `prefix`, where they are whole and made of the same things in the same way.

    Damaged files do not match, and so are made again; with `check` they are an error.
    """
    if not manifest_path(prefix).exists():
        if bin_path(prefix).exists() and idx_path(prefix).exists():
            raise UserError(
                f"{prefix}.bin and .idx exist without {prefix.name}.json, so this command did not make them; "
                "choose another prefix, or replace them with --force"
            )
        return None
    keys = ("split", "fingerprint", "recipe")
    wanted = (dtype.name, tokenizer, *(source[key] for key in keys))
    try:
        manifest = verify(prefix) if check else IndexedTokens.open(prefix).manifest
    except UserError:
        if check:
            raise
        return None
    assert manifest is not None
    found = (manifest.dtype, manifest.tokenizer, *(manifest.source.get(key) for key in keys))
    return manifest if found == wanted else None


def _estimated_bytes(corpus: CorpusSpec, split: Split) -> int:
    match corpus:
        case GrammarCorpusSpec():
            return BYTES_PER_STORY * num_stories(corpus, split)
        case FilesCorpusSpec():
            from trainkit.data.documents import list_files

            return sum(path.stat().st_size for path in list_files(local_paths(corpus, split)))
        case HubCorpusSpec():
            return available_cores() * WORTH_A_WORKER


# -- chunks of documents -----------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """How much of the text an unfinished build has behind it."""

    documents: int
    """Empty ones included."""
    text_bytes: int


def _chunks(corpus: CorpusSpec, split: Split, commit: str, done: Done) -> Iterator[Chunk]:
    """The documents that are not done yet."""
    if not isinstance(corpus, GrammarCorpusSpec):
        return _text_chunks(_without(done, open_documents(corpus, split, commit)))
    from transformerlm.corpus.stories import split_seed

    count = num_stories(corpus, split)
    seed = split_seed(corpus.seed, split)
    starts = range(done.documents, count, CHUNK_STORIES)
    return (Stories(seed, range(start, min(start + CHUNK_STORIES, count))) for start in starts)


def _without(done: Done, documents: Iterator[str]) -> Iterator[str]:
    """The documents behind those that are done, whose length tells whether the text is still the same."""
    if sum(len(text.encode()) for text in islice(documents, done.documents)) != done.text_bytes:
        raise UserError("the text is not what it was when this build was stopped; start over with --force")
    yield from documents


def _text_chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text) + 1
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Encoded:
    """The tokens of a chunk. Empty documents are left out: they would be an end without a beginning."""
    if isinstance(chunk, Stories):
        from transformerlm.corpus.stories import sample

        chunk = [sample(chunk.seed, index) for index in chunk.indices]
    texts = [text for text in chunk if text]
    end = np.array([tokenizer.eot_id], dtype=dtype)
    parts: list[npt.NDArray[Any]] = []
    for text in texts:
        parts += [tokenizer.encode(text, allowed_special="none").astype(dtype), end]
    lengths = np.array([len(part) + 1 for part in parts[::2]], dtype=np.int32)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    return Encoded(tokens, lengths, sum(len(text.encode()) for text in texts), len(chunk) - len(texts))


# -- processes ---------------------------------------------------------------------------------------------------------

_worker: tuple[Tokenizer, np.dtype[Any]] | None = None
"""What a worker process encodes with; set once when it starts."""


def _encode_all(
    chunks: Iterator[Chunk], tokenizer: Tokenizer, dtype: np.dtype[Any], workers: int
) -> Generator[Encoded]:
    """The encoded chunks in order, at most a few per worker ahead of the consumer."""
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer, dtype) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A fork of a process that has threads (torch, Numba) can deadlock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, dtype),
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            with _interrupts_withheld():  # any task may start a process, as long as all are busy
                pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for lack of memory; try --workers 1") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_withheld() -> Generator[None]:
    """Processes started here never see Ctrl-C, which reaches the whole group: the parent decides what it means."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    global _worker
    _worker = tokenizer, dtype
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker waits for its next chunk in a pipe that it holds open itself: it would not notice a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    assert _worker is not None
    return encode_chunk(chunk, *_worker)
