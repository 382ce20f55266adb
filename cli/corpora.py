"""From a `[corpus]` table to documents, and to a fingerprint that tells whether what was made of them is current."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from config.corpora import CorpusSpec, FilesCorpusSpec, GrammarCorpusSpec, HubCorpusSpec
from trainkit.data.splits import Split, iterate, pieces, split_of
from trainkit.errors import UserError

SPLIT_RECIPE = 2
"""Raise it when documents are held out in another way."""


def open_documents(corpus: CorpusSpec, split: Split, commit: str = "") -> Iterator[str]:
    """The documents of one split, in a fixed order, streamed. A split that the corpus does not have is empty.

    `commit`: of a hub data set, what `find_commit` has found at some time; "" = what it finds now.
    """
    if not has_split(corpus, split):
        return iter(())
    match corpus:
        case GrammarCorpusSpec():
            return _grammar_documents(corpus, split)
        case FilesCorpusSpec():
            return _selected(_file_documents(corpus, split), corpus, split)
        case HubCorpusSpec():
            return _selected(_hub_documents(corpus, split, commit or find_commit(corpus)), corpus, split)


def find_commit(corpus: CorpusSpec) -> str:
    """The commit of a hub data set that `revision` stands for now; empty for other corpora."""
    match corpus:
        case HubCorpusSpec():
            return _commit(corpus.dataset_name, corpus.revision, corpus.cache_dir)
        case _:
            return ""


def has_split(corpus: CorpusSpec, split: Split) -> bool:
    """Whether the corpus has documents of this split."""
    match corpus:
        case GrammarCorpusSpec():
            return num_stories(corpus, split) > 0
        case FilesCorpusSpec():
            return bool(local_paths(corpus, split))
        case HubCorpusSpec():
            return bool(_hub_split(corpus, split))


def fingerprint(corpus: CorpusSpec, split: Split) -> str:
    """A hash of what `open_documents` would give, made of the grammar or the content of local files and of the settings
    that this split depends on: what concerns the other splits only does not count. Of a hub data set it covers the
    name and `revision` as they are set: to ask for the newest commit would take the network for what is made already.
    """
    facts = {"kind": corpus.kind, "split": split, **_facts(corpus, split)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts(corpus: CorpusSpec, split: Split) -> dict[str, Any]:
    match corpus:
        case GrammarCorpusSpec():
            from transformerlm.corpus import stories

            return {"grammar": stories.fingerprint(), "seed": corpus.seed, "stories": num_stories(corpus, split)}
        case FilesCorpusSpec():
            from trainkit.artifacts import sha256_file
            from trainkit.data.documents import list_files

            return {
                # The name counts because it tells how to read the content.
                "files": [(path.name, sha256_file(path)) for path in list_files(local_paths(corpus, split))],
                **_selection(corpus, split),
            }
        case HubCorpusSpec():
            return {
                "dataset": (corpus.dataset_name, corpus.dataset_config, corpus.revision, _hub_split(corpus, split)),
                **_selection(corpus, split),
            }


def num_stories(corpus: GrammarCorpusSpec, split: Split) -> int:
    return {"train": corpus.num_train_stories, "val": corpus.num_val_stories, "test": corpus.num_test_stories}[split]


def _grammar_documents(corpus: GrammarCorpusSpec, split: Split) -> Iterator[str]:
    from transformerlm.corpus.stories import sample, split_seed

    seed = split_seed(corpus.seed, split)
    return (sample(seed, index) for index in range(num_stories(corpus, split)))


# -- held-out documents ------------------------------------------------------------------------------------------------


def _fractions(corpus: FilesCorpusSpec | HubCorpusSpec) -> Mapping[Split, float]:
    """Shares of the training documents that are held out; files or a split of their own take their place."""
    files = isinstance(corpus, FilesCorpusSpec)
    return {
        "val": 0.0 if files and corpus.val_paths else corpus.validation_fraction,
        "test": 0.0 if files and corpus.test_paths else corpus.test_fraction,
    }


def _is_from_training(corpus: FilesCorpusSpec | HubCorpusSpec, split: Split) -> bool:
    return split == "train" or _fractions(corpus)[split] > 0


def _selected(documents: Iterator[str], corpus: FilesCorpusSpec | HubCorpusSpec, split: Split) -> Iterator[str]:
    """The documents of this split among those of its files, as many of them as are wanted."""
    fractions = _fractions(corpus)
    if any(fractions.values()) and _is_from_training(corpus, split):
        documents = (text for text in documents if split_of(text, fractions["val"], fractions["test"]) == split)
    return islice(documents, _limit(corpus, split))


def _selection(corpus: FilesCorpusSpec | HubCorpusSpec, split: Split) -> dict[str, Any]:
    """What `_selected` depends on."""
    held_out = {**_fractions(corpus), "recipe": SPLIT_RECIPE} if _is_from_training(corpus, split) else {}
    cut = {"max_document_characters": limit} if (limit := _longest(corpus)) else {}
    return {"text_field": corpus.text_field, "held_out": held_out, "limit": _limit(corpus, split), **cut}


def _longest(corpus: FilesCorpusSpec | HubCorpusSpec) -> int:
    """Characters of a document at most; 0 = any number."""
    return corpus.max_document_characters if isinstance(corpus, FilesCorpusSpec) else 0


def _limit(corpus: FilesCorpusSpec | HubCorpusSpec, split: Split) -> int | None:
    """Documents to read at most; None = all."""
    limits = {"train": corpus.max_train_documents, "val": corpus.max_val_documents, "test": corpus.max_test_documents}
    return limits[split] or None


# -- files -------------------------------------------------------------------------------------------------------------


def local_paths(corpus: FilesCorpusSpec, split: Split) -> tuple[str, ...]:
    """The files that a split comes from: its own, or the training files where a share of them is held out."""
    if _is_from_training(corpus, split):
        return corpus.train_paths
    return corpus.val_paths if split == "val" else corpus.test_paths


def _file_documents(corpus: FilesCorpusSpec, split: Split) -> Iterator[str]:
    from trainkit.data.documents import iterate_documents

    documents = iterate_documents([Path(path) for path in local_paths(corpus, split)], text_field=corpus.text_field)
    if not corpus.max_document_characters:
        return documents
    return (piece for text in documents for piece in pieces(text, corpus.max_document_characters))


# -- hub ---------------------------------------------------------------------------------------------------------------


def _hub_split(corpus: HubCorpusSpec, split: Split) -> str:
    """The data set's split that one of ours comes from; empty where there is none."""
    if _is_from_training(corpus, split):
        return corpus.train_split
    return corpus.val_split if split == "val" else corpus.test_split


@cache
def _commit(name: str, revision: str, cache_dir: str) -> str:
    """Asked once: all that a command makes is made of the same documents."""
    from cli.text_sources import network
    from trainkit.data.hub import resolve_revision

    return resolve_revision(name, revision, cache_dir=cache_dir, network=network())


def _hub_documents(corpus: HubCorpusSpec, split: Split, commit: str) -> Iterator[str]:
    from cli.text_sources import network
    from trainkit.data.hub import open_hub_documents

    whole = any(_fractions(corpus).values()) and _is_from_training(corpus, split)
    documents = open_hub_documents(
        corpus.dataset_name,
        config=corpus.dataset_config,
        split=_hub_split(corpus, split),
        revision=commit,
        text_field=corpus.text_field,
        cache_dir=corpus.cache_dir,
        streaming=not corpus.cache_dir,
        max_documents=0 if whole else _limit(corpus, split) or 0,
        network=network(),
    )
    return iterate(documents)


def require_documents(documents: Iterator[str], what: str) -> Iterator[str]:
    """The same documents; an empty corpus is one sentence."""
    first = next(documents, None)
    if first is None:
        raise UserError(f"{what} holds no documents; check the [corpus] table")
    return chain([first], documents)
