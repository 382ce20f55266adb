"""Text data sets of the Hugging Face hub: streamed from any row on, or kept on the disk.

Every data file of a split is a shard. Which files those are is asked of `datasets` once; the files themselves are read
here, byte by byte and only the text column of Parquet, so that any trouble is waited out at the exact row
(`hub_files`). Whatever is permanent is one sentence at once.

| `streaming` | a cache is named (`cache_dir`, `HF_DATASETS_CACHE`) | what is read |
|---|---|---|
| yes | no | the network; nothing is kept |
| yes | yes | each file is fetched when it is first needed, and kept; same order as above |
| no | either | all files are fetched first and kept; any document is found at once |

With `HF_DATASETS_OFFLINE` or `HF_HUB_OFFLINE` only what is kept is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from trainkit.data.document_sets import IndexedDocuments, Shard, ShardedDocuments
from trainkit.data.hub_cache import CachedTexts, cache_root, is_cache_named, keep, read_json, write_json
from trainkit.data.hub_files import HubFile, Network, explain
from trainkit.data.hub_rows import SUFFIXES, is_readable, read_rows
from trainkit.errors import UserError
from trainkit.retries import retry

_TRUE = {"1", "ON", "YES", "TRUE"}
_COMMIT_LENGTH = 40


def open_hub_documents(
    name: str,
    *,
    config: str = "",
    split: str,
    revision: str = "",
    text_field: str = "text",
    cache_dir: str = "",
    streaming: bool = True,
    max_documents: int = 0,
    network: Network | None = None,
) -> ShardedDocuments | IndexedDocuments:
    """The documents of one split, in the order of the data set's files and rows.

    `revision`: a branch, tag or commit, "" = the newest; a run that must see the same data again gives the commit that
    `resolve_revision` has found. `max_documents`: only so many from the front, 0 = all. The identity holds everything
    that the documents depend on, the commit included.
    """
    network = network or Network()
    revision = resolve_revision(name, revision, cache_dir=cache_dir, network=network)
    root = cache_root(cache_dir)
    keeps = not streaming or is_cache_named(cache_dir) or is_offline()
    split_files = _list_split(name, config, split, revision, root=root if keeps else None, network=network)
    identity = json.dumps(
        {"hub": name, "config": config, "split": split, "field": text_field, "revision": revision}
        | ({"first": max_documents} if max_documents else {})
    )
    files = [HubFile(name, revision, path) for path in split_files]
    if keeps:
        folder = _folder(root, name, revision, "texts", config, split, text_field)
        kept = [
            _KeptShard(file, text_field, folder / f"{number:05d}.arrow", network) for number, file in enumerate(files)
        ]
        if not streaming:
            return KeptDocuments(kept, max_documents, identity)
        shards: Sequence[Shard] = kept
    else:
        shards = [_RemoteShard(file, text_field, network) for file in files]
    return ShardedDocuments([_FirstDocuments(shards, max_documents)] if max_documents else shards, identity)


def is_offline() -> bool:
    return any(os.environ.get(key, "").upper() in _TRUE for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"))


def resolve_revision(name: str, revision: str = "", *, cache_dir: str = "", network: Network | None = None) -> str:
    """The commit that `revision` stands for now ("" = the newest); a commit stands for itself.

    Without network it is the one that was found last with this cache.
    """
    if len(revision) == _COMMIT_LENGTH and all(digit in "0123456789abcdef" for digit in revision):
        return revision
    network = network or Network()
    note = _folder(cache_root(cache_dir), name, "revisions", revision).with_suffix(".json")
    if is_offline():
        known = read_json(note)
        if known is None:
            raise UserError(_not_kept(name, note.parent.parent.parent))
        return str(known["commit"])

    def ask() -> str:
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(name, revision=revision or None, timeout=network.stall).sha
        except Exception as error:
            raise explain(error, _what(name, revision)) from error
        assert commit is not None
        return commit

    commit = retry(ask, network.first_contact(_what(name, revision)))
    with suppress(UserError):  # a stream that keeps nothing needs no place to write to
        write_json(note, {"dataset": name, "revision": revision, "commit": commit})
    return commit


def _what(name: str, revision: str = "") -> str:
    return f"data set {name!r}" + (f" at revision {revision!r}" if revision else "")


def _not_kept(name: str, root: Path) -> str:
    return (
        f"the data set {name!r} is not complete in {root}, and HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set: run once "
        "with the network and with data.cache_dir or HF_DATASETS_CACHE naming this cache"
    )


def _folder(root: Path, name: str, *parts: str) -> Path:
    """A place in the cache: a readable name, and a hash where a part (of several) may hold anything."""
    readable, rest = (parts[:1], parts[1:])
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:16]
    return Path(root, "texts", name.replace("/", "___"), *readable, digest)


def _list_split(name: str, config: str, split: str, revision: str, *, root: Path | None, network: Network) -> list[str]:
    """Paths of the data files of a split; kept below `root`, where one is given."""
    note = root and _folder(root, name, revision, "files", config, split).with_suffix(".json")
    if note and (known := read_json(note)):
        return list(known["paths"])
    if is_offline():
        raise UserError(_not_kept(name, root or cache_root("")))
    paths = retry(lambda: _ask_for_files(name, config, split, revision), network.first_contact(_what(name)))
    if note:
        write_json(note, {"dataset": name, "config": config, "split": split, "commit": revision, "paths": paths})
    return paths


def _ask_for_files(name: str, config: str, split: str, revision: str) -> list[str]:
    import datasets

    where = f"the data set {name!r}" + (f", configuration {config!r}," if config else "")
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(f"hf://datasets/{name}", config or None, revision=revision)
    except ValueError as error:  # of the configuration; the library's sentence lists what there is
        raise UserError(f"{where} cannot be opened: {_first_sentence(error)}; set dataset_config") from error
    except Exception as error:
        problem = explain(error, _what(name, revision))
        if isinstance(problem, UserError) and type(error).__name__ == "DataFilesNotFoundError":
            problem = UserError(f"{where} holds no data files that can be read; choose another data set")
        raise problem from error
    found: dict[str, Sequence[str]] = {str(key): files for key, files in (builder.config.data_files or {}).items()}
    if split not in found:
        raise UserError(
            f"{where} has no split {split!r}; it has {', '.join(found) or 'none'}: name one of these, or hold "
            "documents out of one with validation_fraction (test_fraction)"
        )
    prefix = f"hf://datasets/{name}@{revision}/"
    for file in found[split]:
        if not file.startswith(prefix) or not is_readable(file):
            raise UserError(
                f"{where} is made of files such as {file.removeprefix(prefix)}, which cannot be streamed; convert them "
                f"to one of {', '.join(SUFFIXES)} and give dataset_name the folder"
            )
    return [file.removeprefix(prefix) for file in found[split]]


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split("\nExample")[0].split()).rstrip(".")


@contextmanager
def _quiet() -> Generator[None]:
    """The libraries' own lines about retries and progress bars would come between ours."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


@dataclass(frozen=True)
class _RemoteShard:
    """A data file, read over the network."""

    file: HubFile
    text_field: str
    network: Network

    def read(self, start: int) -> Iterator[str]:
        def open_file(buffer_size: int) -> Any:
            return self.file.open(self.network, buffer_size=buffer_size)

        return read_rows(self.file.path, self.file.name, open_file, self.text_field, start)


@dataclass(frozen=True)
class _KeptShard:
    """A data file whose texts are fetched when they are first needed."""

    file: HubFile
    text_field: str
    path: Path
    network: Network

    def read(self, start: int) -> Iterator[str]:
        return self.texts.read(start)

    @cached_property
    def texts(self) -> CachedTexts:
        if is_offline() and not self.path.exists():
            raise UserError(_not_kept(self.file.dataset, self.path.parent))
        keep(self.path, self._fetch)
        return CachedTexts(self.path)

    def _fetch(self) -> Iterator[str]:
        self.network.report(f"fetching {self.file.name}")
        return _RemoteShard(self.file, self.text_field, self.network).read(0)


@dataclass
class _FirstDocuments:
    """The first documents of several shards as one shard."""

    shards: Sequence[Shard]
    limit: int
    _sizes: dict[int, int] = field(default_factory=dict[int, int], init=False)
    """Documents in the shards that have been read to their end: they need not be read again to get past them. Several
    threads may find the same one."""

    def read(self, start: int) -> Iterator[str]:
        position = 0  # of the first document of the shard
        for number, shard in enumerate(self.shards):
            if number in self._sizes and position + self._sizes[number] <= start:
                position += self._sizes[number]
                continue
            end = max(start, position)
            if end >= self.limit:
                return
            for text in islice(shard.read(end - position), self.limit - end):
                yield text
                end += 1
            if end == start:  # it ends before: only from its front can its size be told
                end = position + sum(1 for _ in shard.read(0))
            self._sizes[number] = end - position
            position = end


class KeptDocuments:
    """All files of a split on the disk; `IndexedDocuments`."""

    def __init__(self, shards: Sequence[_KeptShard], max_documents: int, identity: str) -> None:
        self.identity = identity
        self._files: list[CachedTexts] = []
        size = 0
        for shard in shards:
            self._files.append(shard.texts)
            size += len(shard.texts)
            if max_documents and size >= max_documents:
                break
        self._ends = list(accumulate(len(file) for file in self._files))
        self._size = min(size, max_documents or size)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> str:
        if not 0 <= index < self._size:
            raise IndexError(index)
        file = bisect_right(self._ends, index)
        return self._files[file][index - (self._ends[file - 1] if file else 0)]
