"""Whether the text of a `files` corpus is there and whole: shards are compared with the manifest beside them."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from cli.common import counted
from cli.corpora import has_split, local_paths, open_documents
from cli.stages import say
from config.corpora import CorpusSpec, FilesCorpusSpec
from trainkit.artifacts import MANIFEST, is_sealed, read_manifest, verify_directory
from trainkit.data.documents import SUFFIXES, list_files
from trainkit.data.text_shards import KIND
from trainkit.errors import UserError

SHARDS = "shard-[0-9]*"
_BLOCK = 1 << 20


def check_text(corpus: CorpusSpec) -> None:
    """Refuse local text that is missing, empty or, as shards, not what their manifest says, or too little to divide."""
    match corpus:
        case FilesCorpusSpec():
            for path in map(Path, (*corpus.train_paths, *corpus.val_paths, *corpus.test_paths)):
                check_path(path)
            check_splits(corpus)
        case _:
            pass


def check_path(path: Path) -> None:
    for folder in sorted({path, *(manifest.parent for manifest in path.rglob(MANIFEST))}) if path.is_dir() else []:
        if is_shards(folder):
            check_shards(folder)
    if not any(file.stat().st_size for file in list_files([path])):
        raise UserError(f"{path} is empty; give it some text")


def check_splits(corpus: FilesCorpusSpec) -> None:
    """Refuse a share of so few documents that none is in it."""
    for split in ("train", "val", "test"):
        if has_split(corpus, split) and next(open_documents(corpus, split), None) is None:
            raise UserError(
                f"no document of {', '.join(local_paths(corpus, split))} falls to {split}: take more text, another "
                "corpus.validation_fraction, or cut it into more documents by corpus.max_document_characters"
            )


def is_shards(folder: Path) -> bool:
    """Whether `scripts/shard_dataset.py` wrote the folder; refuses one of which only the manifest is damaged."""
    if (folder / MANIFEST).exists() and any(folder.glob(SHARDS)):
        return read_manifest(folder).get("kind") == KIND
    return is_sealed(folder, kind=KIND)


def check_shards(folder: Path) -> None:
    """The names, SHA-256 and lines of all shards of a folder."""
    manifest = verify_directory(folder)
    files = [folder / name for name in manifest["files"]]
    extra = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file not in files)
    if extra:
        raise UserError(f"{extra[0]} is not in {folder / MANIFEST}: remove it, or write the shards again")
    lines = count_lines(files)
    if lines != manifest["documents"]:
        raise UserError(
            f"the shards in {folder} have {counted(lines, 'line')} where {MANIFEST} says {manifest['documents']:,}: "
            "write them again"
        )
    say("input", f"{folder}: {counted(lines, 'document')} in {counted(len(files), 'shard')}, as {MANIFEST} says")


def count_lines(files: Iterable[Path]) -> int:
    """Line breaks of all files, decompressed; on several cores, since to decompress is what takes long."""
    with ThreadPoolExecutor() as pool:
        return sum(pool.map(_count_lines, files))


def _count_lines(file: Path) -> int:
    with cast(BinaryIO, gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))
