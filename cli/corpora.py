"""From a `[corpus]` table to documents, and to a fingerprint that tells whether what was made of them is current."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

from config.corpora import CorpusSpec, FilesCorpusSpec, GrammarCorpusSpec, HubCorpusSpec
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
    """A hash of what `open_documents` would give, made of the grammar or the content of local files and of the settings
    that this split depends on: what concerns the other split only does not count."""
    facts = {"kind": corpus.kind, "split": split, **_facts(corpus, split)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts(corpus: CorpusSpec, split: Split) -> dict[str, Any]:
    match corpus:
        case GrammarCorpusSpec():
            from transformerlm.corpus import stories

            return {"grammar": stories.fingerprint(), "seed": corpus.seed, "stories": _num_stories(corpus, split)}
        case FilesCorpusSpec():
            from trainkit.artifacts import sha256_file
            from trainkit.data.documents import list_files

            return {
                # The name counts because it tells how to read the content.
                "files": [(path.name, sha256_file(path)) for path in list_files(_paths(corpus, split))],
                "text_field": corpus.text_field,
                "held_out": 0.0 if corpus.val_paths else corpus.validation_fraction,
                "limit": _limit(corpus, split),
            }
        case HubCorpusSpec():  # what the hub holds under a name is not known without asking it
            name = _hub_split(corpus, split)
            return {
                "dataset": (corpus.dataset_name, name),
                "text_field": corpus.text_field,
                "limit": _limit(corpus, split),
            }


def _num_stories(corpus: GrammarCorpusSpec, split: Split) -> int:
    return corpus.num_train_stories if split == "train" else corpus.num_val_stories


def _limit(corpus: FilesCorpusSpec | HubCorpusSpec, split: Split) -> int | None:
    """Documents to read at most; None = all."""
    return (corpus.max_train_documents if split == "train" else corpus.max_val_documents) or None


def _hub_split(corpus: HubCorpusSpec, split: Split) -> str:
    return corpus.train_split if split == "train" else corpus.val_split


def _grammar_documents(corpus: GrammarCorpusSpec, split: Split) -> Iterator[str]:
    from transformerlm.corpus.stories import sample, split_seed

    seed = split_seed(corpus.seed, split)
    return (sample(seed, index) for index in range(_num_stories(corpus, split)))


def _file_documents(corpus: FilesCorpusSpec, split: Split) -> Iterator[str]:
    from trainkit.data.documents import iterate_documents

    documents: Iterable[str] = iterate_documents([Path(p) for p in _paths(corpus, split)], text_field=corpus.text_field)
    if corpus.validation_fraction and not corpus.val_paths:
        wanted = split == "val"
        documents = (
            text for index, text in enumerate(documents) if _is_held_out(index, corpus.validation_fraction) == wanted
        )
    return islice(documents, _limit(corpus, split))


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
    name = _hub_split(corpus, split)
    if not name:
        return
    where, column = f"the data set {corpus.dataset_name!r}", corpus.text_field
    for number, row in enumerate(islice(_hub_rows(corpus, name), _limit(corpus, split)), start=1):
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; it has {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str):
            found = type(text).__name__
            raise UserError(f"row {number} of {where} has {found} in {column!r}, not a string; name another text_field")
        yield text


def _hub_rows(corpus: HubCorpusSpec, name: str) -> Iterator[dict[str, object]]:
    import datasets

    try:
        yield from cast(
            "Iterable[dict[str, object]]",
            datasets.load_dataset(
                corpus.dataset_name, split=name, cache_dir=corpus.cache_dir or None, streaming=not corpus.cache_dir
            ),
        )
    except Exception as error:
        # The library raises a dozen unrelated types for a name, a network (at any row) or a login that is wrong.
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot read the split {name!r} of the data set {corpus.dataset_name!r} ({reason}); "
            "check its name, the network, and HF_TOKEN where it is private"
        ) from error


def require_documents(documents: Iterator[str], what: str) -> Iterator[str]:
    """The same documents; an empty corpus is one sentence."""
    first = next(documents, None)
    if first is None:
        raise UserError(f"{what} holds no documents; check the [corpus] table")
    return chain([first], documents)
