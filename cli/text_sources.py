"""Documents of a `packed` or `rows` table: which data set, which split, and what of it."""

from __future__ import annotations

import os
import re
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.documents import SUFFIXES, open_local_documents
from trainkit.data.specs import StreamDataSpec
from trainkit.data.splits import Documents, Split, cut, first, iterate, joined, only
from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.data.hub_files import Network

DEFAULT_CACHE = "data/cache"
SHOWN_NAMES = 8
"""Entries of a folder that a message lists."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(name: str) -> bool:
    """Whether `dataset_name` means a file or folder: because it is there, or because it cannot be a hub data set."""
    if Path(name).expanduser().exists():
        return True
    return name.endswith(SUFFIXES) or name.startswith(".") or not _HUB_NAME.fullmatch(name)


def check_local(spec: StreamDataSpec) -> None:
    """Refuse a path that is not there."""
    if is_local(spec.dataset_name) and not Path(spec.dataset_name).expanduser().exists():
        raise UserError(f'data.dataset_name = "{spec.dataset_name}" does not exist; check the path')


def find_revision(spec: StreamDataSpec, recorded: str = "") -> str:
    """The commit that a run reads: the one it began with, else the one that `revision` stands for now."""
    if is_local(spec.dataset_name):
        return ""
    from trainkit.data.hub import resolve_revision

    return recorded or resolve_revision(
        spec.dataset_name, spec.revision, cache_dir=cache_directory(spec), network=network()
    )


def training_documents(spec: StreamDataSpec, revision: str) -> Documents:
    """What is trained on."""
    documents = _open(spec, spec.train_split, revision, _limit(spec, spec.small_train_samples))
    return _of_split(spec, documents, "train")


def held_out_texts(spec: StreamDataSpec, split: Split, revision: str) -> list[str] | None:
    """The first documents of the validation or test split, None where there is none."""
    fraction = spec.validation_fraction if split == "val" else spec.test_fraction
    if fraction:
        documents = _open(spec, spec.train_split, revision, _limit(spec, spec.small_train_samples))
        return _first_texts(spec, _of_split(spec, documents, split))
    name = spec.val_split if split == "val" else spec.test_split
    return named_texts(spec, name, revision) if name else None


def named_texts(spec: StreamDataSpec, where: str, revision: str) -> list[str]:
    """The first documents of another split of the same data set, or of a local file or folder."""
    if "/" in where or where.endswith(SUFFIXES):
        return _first_texts(spec, _open_local(spec, [Path(where).expanduser()]))
    limit = _least(_limit(spec, spec.small_val_samples), 0 if spec.max_document_characters else spec.max_val_documents)
    return _first_texts(spec, _open(spec, where, revision, limit))


def cache_directory(spec: StreamDataSpec) -> str:
    """Where downloads go: the setting, else what the environment names, else one folder for all runs.

    A stream that was given no folder keeps nothing.
    """
    named = any(os.environ.get(name) for name in ("HF_DATASETS_CACHE", "HF_HOME"))
    return spec.cache_dir or ("" if named or spec.streaming else DEFAULT_CACHE)


def _open(spec: StreamDataSpec, split: str, revision: str, limit: int) -> Documents:
    """The documents of a split, the first `limit` of them, 0 = all."""
    if is_local(spec.dataset_name):
        local = _open_local(spec, _local_paths(Path(spec.dataset_name).expanduser(), split, spec))
        return first(local, limit) if limit else local
    if not spec.max_document_characters:
        return _open_hub(spec, split, revision, limit)
    if not spec.streaming:
        raise UserError(
            f'data.max_document_characters cuts documents while they are streamed: "{spec.dataset_name}" needs '
            "data.streaming = true (data.cache_dir keeps what was read), or leave its documents whole with 0"
        )
    documents = _open_hub(spec, split, revision, limit=0)
    assert isinstance(documents, ShardedDocuments)
    pieces = cut(documents, spec.max_document_characters)
    return first(pieces, limit) if limit else pieces


def _open_hub(spec: StreamDataSpec, split: str, revision: str, limit: int) -> Documents:
    from trainkit.data.hub import open_hub_documents

    return open_hub_documents(
        spec.dataset_name,
        config=spec.dataset_config,
        split=split,
        revision=revision,
        text_field=spec.text_field,
        cache_dir=cache_directory(spec),
        streaming=spec.streaming,
        max_documents=limit,
        network=network(),
    )


def _open_local(spec: StreamDataSpec, paths: list[Path]) -> Documents:
    documents = joined([open_local_documents(path, text_field=spec.text_field) for path in paths])
    return cut(documents, spec.max_document_characters) if spec.max_document_characters else documents


def _local_paths(path: Path, split: str, spec: StreamDataSpec) -> list[Path]:
    """What a split is made of: in a folder, the folder or files of its name; else the training split is everything."""
    check_local(spec)
    if named := _named(path, split):
        return named
    if split != spec.train_split:
        raise UserError(_nothing_named(path, split, *_setting(spec, split)))
    if split not in ("", StreamDataSpec.train_split):
        raise UserError(_nothing_named(path, split, "data.train_split", "leave it out to train on everything"))
    held_out = [spec.val_split] * (not spec.validation_fraction) + [spec.test_split] * (not spec.test_fraction)
    if beside := [name for name in held_out if _named(path, name)]:
        raise UserError(
            f'data.dataset_name = "{path}" has "{beside[0]}" and nothing named "{split}": name the training files in '
            "data.train_split"
        )
    return [path]


def _setting(spec: StreamDataSpec, split: str) -> tuple[str, str]:
    """Which setting names a split that is not trained on, and what else could be done."""
    if split == spec.val_split and not spec.validation_fraction:
        return (
            "data.val_split",
            'hold some out with data.validation_fraction = 0.05, or go without: data.val_split = ""',
        )
    if split == spec.test_split and not spec.test_fraction:
        return "data.test_split", 'hold some out with data.test_fraction = 0.05, or go without: data.test_split = ""'
    names = [name for name, where in spec.validation_sets.items() if where == split]
    return f"data.validation_sets.{names[0]}", "give the path of a file, with its ending"


def _nothing_named(path: Path, split: str, setting: str, advice: str) -> str:
    found = "it is one file without splits; "
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if _is_listed(entry))
        shown = [*names[:SHOWN_NAMES], *["…"] * (len(names) > SHOWN_NAMES)]
        found = f"it has {', '.join(shown)}; name one of these, or " if names else "it has no text; "
    return f'data.dataset_name = "{path}" has nothing named "{split}" ({setting}): {found}{advice}'


def _is_listed(entry: Path) -> bool:
    return not entry.name.startswith(".") and (entry.is_dir() or entry.name.endswith(SUFFIXES))


def _named(path: Path, split: str) -> list[Path]:
    """The entries of a folder that make up a split."""
    if not split or not path.is_dir():
        return []
    return [entry for entry in sorted(path.glob(f"{split}*")) if _is_named(entry, path / split)]


def _is_named(entry: Path, wanted: Path) -> bool:
    """`train`, `train.jsonl`, `train-00000-of-00002.parquet`, but not `training.txt`."""
    rest = entry.name[len(wanted.name) :]
    return rest == "" or (rest[0] in ".-_" and entry.name.endswith(SUFFIXES))


def _of_split(spec: StreamDataSpec, documents: Documents, split: Split) -> Documents:
    if not spec.validation_fraction and not spec.test_fraction:
        return documents
    return only(documents, split, spec.validation_fraction, spec.test_fraction)


def _first_texts(spec: StreamDataSpec, documents: Documents) -> list[str]:
    return list(islice(iterate(documents), spec.max_val_documents or None))


def _limit(spec: StreamDataSpec, count: int) -> int:
    return count if spec.dataset_variant == "small" else 0


def _least(*limits: int) -> int:
    """The smallest of the limits, where 0 is none."""
    return min((limit for limit in limits if limit), default=0)


def network() -> Network:
    """Troubles of the network are told on the standard error."""
    from trainkit.data.hub_files import Network

    return Network(report=lambda line: print(line, file=sys.stderr, flush=True))
