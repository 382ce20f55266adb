"""The kinds of `[corpus]`: the text that a tokenizer is trained on and token files are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import Discriminator, StringConstraints

NotEmpty = Annotated[str, StringConstraints(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class GrammarCorpusSpec:
    """Stories of the project's own grammar, made on the spot: text whose exact probability is known."""

    kind: Literal["grammar"] = "grammar"
    num_train_stories: Annotated[int, Ge(1)] = 20_000
    """Stories to train on."""
    num_val_stories: Annotated[int, Ge(0)] = 500
    """Stories held out for validation; none of them is trained on."""
    num_test_stories: Annotated[int, Ge(0)] = 0
    """Stories held out for the test, which no run reads."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Which stories: the same seed tells the same ones."""


@dataclass(frozen=True, kw_only=True)
class FilesCorpusSpec:
    """Text files of your own, or folders of them: `.jsonl` and `.parquet` (a document per row), `.lines` (one per line)
    and `.txt` (documents between `<|endoftext|>` lines); all but Parquet also compressed with gzip."""

    kind: Literal["files"] = "files"
    train_paths: tuple[NotEmpty, ...]
    """Files to train on."""
    val_paths: tuple[NotEmpty, ...] = ()
    """Files to validate on."""
    test_paths: tuple[NotEmpty, ...] = ()
    """Files for the test, which no run reads."""
    text_field: NotEmpty = "text"
    """Field or column of a row that holds its text."""
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the training documents held out for validation, chosen by a hash of their text; for when there are no
    `val_paths`."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the training documents held out for the test, chosen in the same way; for when there are no
    `test_paths`."""
    max_document_characters: Annotated[int, Ge(0)] = 0
    """Cut longer documents into pieces of at most so many characters, each a document of its own, so that a share of
    one long text can be held out; 0 = leave all whole."""
    max_train_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many training documents; 0 = all."""
    max_val_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many validation documents; 0 = all."""
    max_test_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many test documents; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class HubCorpusSpec:
    """A data set of the Hugging Face hub made of Parquet, JSON lines or text files."""

    kind: Literal["hub"] = "hub"
    dataset_name: NotEmpty
    """Name of the data set, as in `roneneldan/TinyStories`."""
    dataset_config: str = ""
    """Configuration of a data set that has several, such as `sample-10BT`."""
    revision: str = ""
    """Commit, tag or branch of the data set; empty = the newest. Resolved once, when a build begins."""
    train_split: NotEmpty = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to validate on; empty = none. Not read where `validation_fraction` holds documents out."""
    test_split: str = ""
    """Split for the test, which no run reads; empty = none. Not read where `test_fraction` holds documents out."""
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the documents of `train_split` held out for validation, chosen by a hash of their text."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the documents of `train_split` held out for the test, chosen in the same way."""
    text_field: NotEmpty = "text"
    """Column that holds the text."""
    cache_dir: str = ""
    """Folder that keeps the whole data set, to be read again without network; empty streams it, and keeps it only where
    `HF_DATASETS_CACHE` names a folder."""
    max_train_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many training documents; 0 = all."""
    max_val_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many validation documents; 0 = all."""
    max_test_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many test documents; 0 = all."""


CorpusSpec = GrammarCorpusSpec | FilesCorpusSpec | HubCorpusSpec
Corpus = Annotated[CorpusSpec, Discriminator("kind")]
