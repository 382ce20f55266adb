"""From a `[corpus]` table to documents, and to a fingerprint that tells whether what was made of them is current."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

from config.schemas import CorpusSpec, FilesCorpusSpec, GrammarCorpusSpec, HubCorpusSpec
from trainkit.errors import UserError

Split = Literal["train", "val"]


def open_documents(corpus: CorpusSpec, split: Split) -> Iterator[str]:
    """The documents of one split, in a fixed order, streamed. A split that the corpus does not have is empty."""
    match corpus:
        case GrammarCorpusSpec():
            return _grammar_documents(corpus, split)
        case FilesCorpusSpec():
            return _file_documents(corpus, split)
        case HubCorpusSpec():
            return _hub_documents(corpus, split)


def fingerprint(corpus: CorpusSpec, split: Split) -> str:
    """A hash of what `open_documents` would give: the settings, and the grammar or the content of local files."""
    facts: dict[str, Any] = {"split": split, **dataclasses.asdict(corpus)}
    match corpus:
        case GrammarCorpusSpec():
            from transformerlm.corpus import stories

            facts["grammar"] = stories.fingerprint()
        case FilesCorpusSpec():
            from trainkit.artifacts import sha256_file
            from trainkit.data.documents import list_files

            facts["sha256"] = [sha256_file(path) for path in list_files(_paths(corpus, split))]
        case HubCorpusSpec():
            pass  # what the hub holds under a name is not known without asking it
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _grammar_documents(corpus: GrammarCorpusSpec, split: Split) -> Iterator[str]:
    from transformerlm.corpus.stories import sample, split_seed

    seed = split_seed(corpus.seed, split)
    count = corpus.num_train_stories if split == "train" else corpus.num_val_stories
    return (sample(seed, index) for index in range(count))


def _file_documents(corpus: FilesCorpusSpec, split: Split) -> Iterator[str]:
    from trainkit.data.documents import iterate_documents

    documents: Iterable[str] = iterate_documents([Path(p) for p in _paths(corpus, split)], text_field=corpus.text_field)
    if corpus.validation_fraction and not corpus.val_paths:
        wanted = split == "val"
        documents = (
            text for index, text in enumerate(documents) if _is_held_out(index, corpus.validation_fraction) == wanted
        )
    limit = corpus.max_train_documents if split == "train" else corpus.max_val_documents
    return islice(documents, limit or None)


def _paths(corpus: FilesCorpusSpec, split: Split) -> tuple[str, ...]:
    """The files that a split comes from; without validation files the training files may hold both splits."""
    if split == "train" or (corpus.validation_fraction and not corpus.val_paths):
        return corpus.train_paths
    return corpus.val_paths


def _is_held_out(index: int, fraction: float) -> bool:
    """Decided by the document's number alone, so that a longer file keeps the split of its beginning."""
    digest = hashlib.sha256(f"held out/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def _hub_documents(corpus: HubCorpusSpec, split: Split) -> Iterator[str]:
    name, column = corpus.train_split if split == "train" else corpus.val_split, corpus.text_field
    if not name:
        return iter(())
    import datasets

    try:
        rows = datasets.load_dataset(
            corpus.dataset_name, split=name, cache_dir=corpus.cache_dir or None, streaming=not corpus.cache_dir
        )
        first = next(iter(rows), None)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types for a name, a network or a login that is wrong
        reason = str(error).split("\n")[0]
        raise UserError(
            f"cannot read the split {name!r} of the data set {corpus.dataset_name!r} ({reason}); "
            "check its name, the network, and HF_TOKEN where it is private"
        ) from error
    if first is not None and column not in first:
        columns = ", ".join(first)
        raise UserError(f"the data set {corpus.dataset_name!r} has no column {column!r}; it has {columns}")
    limit = corpus.max_train_documents if split == "train" else corpus.max_val_documents
    texts = (cast("dict[str, str]", row)[column] for row in rows)
    return islice(texts, limit or None)


def require_documents(documents: Iterator[str], what: str) -> Iterator[str]:
    """The same documents; an empty corpus is one sentence."""
    first = next(documents, None)
    if first is None:
        raise UserError(f"{what} holds no documents; check the [corpus] table")
    return chain([first], documents)
