"""Settings of the data pipelines. Told apart by `pipeline_mode`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

OrderName = Literal["stable", "megatron"]


@dataclass(frozen=True, kw_only=True)
class MegatronDataSpec:
    """Token files in Megatron-LM's `.bin`/`.idx` layout, read as windows straight from the memory map."""

    pipeline_mode: Literal["megatron"] = "megatron"
    megatron_train_prefix: str = ""
    """Path of the training files without `.bin`/`.idx`."""
    megatron_val_prefix: str = ""
    """Path of the validation files without `.bin`/`.idx`; empty = no validation set."""
    megatron_test_prefix: str = ""
    """Path of the test files without `.bin`/`.idx`, which no run reads: `transformerlm-eval` does."""
    validation_sets: dict[str, str] = field(default_factory=dict[str, str])
    """More validation sets, by name: paths of token files without `.bin`/`.idx`. The loss of the set `wiki` is logged
    as `val_loss/wiki`."""
    blend_prefixes: tuple[str, ...] = ()
    """Several training files to mix, in place of `megatron_train_prefix`."""
    blend_weights: tuple[Annotated[float, Gt(0)], ...] = ()
    """How much of each file of `blend_prefixes`: shares of the samples, in proportion to each other."""
    order: OrderName = "stable"
    """`stable`: a keyed shuffle that a longer run only continues, without an index in memory. `megatron`: the samples
    of Megatron-LM's `GPTDataset` and `BlendedDataset`, which depend on the length of the run."""
    verify: bool = False
    """Compare the token files with the SHA-256 in their manifests before the first step; their sizes and structure are
    always checked."""
    prefetch: Annotated[int, Ge(0)] = 2
    """Steps that a background thread prepares ahead; 0 reads in the training thread. Does not change the samples."""

    def __post_init__(self) -> None:
        prefixes = self.blend_prefixes
        if prefixes and self.megatron_train_prefix:
            raise ValueError("has both megatron_train_prefix and blend_prefixes: leave one of them empty")
        if len(prefixes) != len(self.blend_weights):
            raise ValueError(f"blend_prefixes has {len(prefixes)} entries, blend_weights {len(self.blend_weights)}")
        if len(prefixes) == 1:
            raise ValueError(f"blend_prefixes has one entry: set megatron_train_prefix to {prefixes[0]!r} instead")
        if twice := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
            raise ValueError(f"blend_prefixes names {twice[0]!r} twice: name it once, with the sum of its weights")


@dataclass(frozen=True, kw_only=True)
class StreamDataSpec:
    """What `packed` and `rows` share: text that is read, shuffled and encoded while the run trains."""

    dataset_name: str = ""
    """A data set of the Hugging Face hub (`roneneldan/TinyStories`), or a local file or folder: `.txt`, `.jsonl`,
    `.parquet`, newline shards (`.lines`); all but Parquet also compressed with gzip."""
    dataset_config: str = ""
    """Configuration of a hub data set that has several, such as `sample-10BT`."""
    revision: str = ""
    """Commit, tag or branch of the hub data set; empty = the newest. Resolved once, when the run begins."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to validate on; empty = none. Not read where `validation_fraction` holds documents out."""
    test_split: str = ""
    """Split that no run reads: `transformerlm-eval` does; empty = none."""
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the documents of `train_split` held out for validation, chosen by a hash of their text: equal documents
    stay together, and those of larger data stay where they were."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the documents of `train_split` held out for the test, chosen in the same way."""
    validation_sets: dict[str, str] = field(default_factory=dict[str, str])
    """More validation sets, by name: a split of the same data set or, with a slash or a file's ending in it, the path
    of a local file or folder. The loss of the set `wiki` is logged as `val_loss/wiki`."""
    max_val_documents: Annotated[int, Ge(0)] = 5_000
    """Documents of each validation set: the first so many, which are kept in memory; 0 = all."""
    dataset_variant: Literal["full", "small"] = "full"
    """`small` takes the first documents of each split and no more, for a quick try."""
    small_train_samples: Annotated[int, Ge(1)] = 50_000
    """Documents of `train_split` in the small variant."""
    small_val_samples: Annotated[int, Ge(1)] = 5_000
    """Documents of every other split in the small variant."""
    max_document_characters: Annotated[int, Ge(0)] = 0
    """Cut longer documents, at the end of a paragraph or line where there is one, into documents of at most so many
    characters: a book becomes many; 0 never cuts."""
    text_field: str = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read a hub data set over the network as it is needed; `false` downloads it into the cache first."""
    cache_dir: str = ""
    """Folder of downloaded data sets, shared by all runs; empty = `HF_DATASETS_CACHE`, else `datasets` in `HF_HOME`,
    else `data/cache`."""
    lanes: Literal[1, 2, 4, 8, 16, 32, 64] = 8
    """Independent streams that the documents are dealt to: any number of ranks that divides it reads the same samples.
    Part of the identity of the data."""
    shuffle_window: Annotated[int, Ge(0)] = 10_000
    """Documents among which a stream is shuffled, anew in each epoch, as are its files; 0 keeps their order. Data of
    known size (downloaded) is shuffled as a whole."""
    workers: Annotated[int, Ge(0)] = 1
    """Threads that encode ahead; 0 encodes where it reads. Does not change the samples."""
    prefetch: Annotated[int, Ge(0)] = 2
    """Steps that a background thread prepares ahead; 0 reads in the training thread. Does not change the samples."""

    def __post_init__(self) -> None:
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction and test_fraction hold out {held_out:g} of the documents: leave some to train on"
            )


@dataclass(frozen=True, kw_only=True)
class PackedDataSpec(StreamDataSpec):
    """Windows full of text: documents one after the other, cut where a window ends."""

    pipeline_mode: Literal["packed"] = "packed"
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate` fills every window to the last token and cuts documents; `best_fit` keeps those that fit into a
    window whole, and fills what remains with nothing (arXiv:2404.10830)."""
    best_fit_documents: Annotated[int, Ge(1)] = 512
    """Documents of a lane that `best_fit` packs together."""


@dataclass(frozen=True, kw_only=True)
class RowsDataSpec(StreamDataSpec):
    """One document a window: longer ones are cut, the rest of a window is filled with nothing."""

    pipeline_mode: Literal["rows"] = "rows"


DataSpec = MegatronDataSpec | PackedDataSpec | RowsDataSpec
