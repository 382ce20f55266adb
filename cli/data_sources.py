"""From a `[data]` table to what a run reads: its training source, its validation sets, and what identifies them.

One function for each `pipeline_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cli.text_sources import find_revision, held_out_texts, named_texts, training_documents
from cli.validation import MAIN, TEST, HeldOut, HeldOutTexts, HeldOutTokens
from config.schemas import TrainConfig
from trainkit.data.megatron import IndexedTokens, verify_all
from trainkit.data.orders import build_order
from trainkit.data.specs import DataSpec, MegatronDataSpec, PackedDataSpec, RowsDataSpec, StreamDataSpec
from trainkit.data.splits import iterate
from trainkit.data.streams import PackedSource, RowsSource
from trainkit.data.windows import MegatronSource
from trainkit.errors import UserError
from trainkit.loop import Source
from trainkit.ramps import units_before
from transformerlm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunData:
    """What a run reads, opened and checked."""

    source: Callable[[int, int], Source]
    """`source(rank, world_size)`: that rank's training batches."""
    validation: Mapping[str, HeldOut]
    """By name; the main one is `val`."""
    inputs: Mapping[str, Any]
    """What `config.json` records, so that a run is not resumed with other data."""
    verify: Callable[[], None] = lambda: None
    """Reads everything once and compares it with its checksums, where the settings ask for that."""


def open_run_data(config: TrainConfig, tokenizer: Tokenizer, revision: str = "") -> RunData:
    """Open what `config.data` names; a stream of the hub at `revision` (see `pinned_revision`)."""
    match config.data:
        case MegatronDataSpec() as data:
            return _open_token_files(config, data, tokenizer)
        case PackedDataSpec() | RowsDataSpec() as data:
            return _open_stream(config, data, tokenizer, revision)


def open_held_out(data: DataSpec, name: str, tokenizer: Tokenizer, revision: str = "") -> HeldOut | None:
    """One set of documents that `data` keeps from training: `val`, `test` or a named one; None where there is none."""
    match data:
        case MegatronDataSpec():
            prefix = megatron_prefix(data, name)
            return HeldOutTokens(_open_tokens(prefix, tokenizer)) if prefix else None
        case PackedDataSpec() | RowsDataSpec():
            return _open_texts(data, name, tokenizer, revision)


def megatron_prefix(data: MegatronDataSpec, name: str) -> str:
    """The files of a held-out set; empty where there are none."""
    return {MAIN: data.megatron_val_prefix, TEST: data.megatron_test_prefix, **data.validation_sets}.get(name, "")


def pinned_revision(data: DataSpec, began_with: Mapping[str, Any]) -> str:
    """The commit of a hub data set: for a run that exists (its `config.json`) the one that it began with."""
    if isinstance(data, MegatronDataSpec):
        return ""
    before = began_with.get("data", {})
    is_same = (before.get("dataset_name"), before.get("revision")) == (data.dataset_name, data.revision)
    return find_revision(data, began_with.get("inputs", {}).get("revision", "") if is_same else "")


# -- megatron ----------------------------------------------------------------------------------------------------------


def _open_token_files(config: TrainConfig, data: MegatronDataSpec, tokenizer: Tokenizer) -> RunData:
    prefixes = data.blend_prefixes or (data.megatron_train_prefix,)
    tokens = [_open_tokens(prefix, tokenizer) for prefix in prefixes]
    order = build_order(
        data.order,
        tokens,
        data.blend_weights,
        context_length=config.model.context_length,
        seed=config.run.seed,
        num_samples=units_before(config.training, config.training.max_steps) // config.model.context_length,
    )

    def source(rank: int, world_size: int) -> Source:
        return MegatronSource(
            order=order,
            samples_per_step=_samples_per_step(config),
            device_batch_size=config.training.device_batch_size,
            rank=rank,
            world_size=world_size,
        )

    validation = _open_validation(data, tokenizer)
    inputs = {"train": " ".join(one.identity for one in tokens), **_identities(validation)}

    def verify_files() -> None:
        if data.verify:
            verify_all(filter(None, (*prefixes, data.megatron_val_prefix, *data.validation_sets.values())))

    return RunData(source, validation, inputs, verify_files)


def _open_tokens(prefix: str, tokenizer: Tokenizer) -> IndexedTokens:
    tokens = IndexedTokens.open(prefix)
    tokens.check_vocabulary(tokenizer.vocab_size)
    made_with = tokens.manifest.tokenizer if tokens.manifest else ""
    if made_with and made_with != tokenizer.content_hash:
        raise UserError(
            f"{prefix} was made with another tokenizer than this one ({made_with[:12]}…, not "
            f"{tokenizer.content_hash[:12]}…); make the files again with uv run transformerlm-make-data, or name their "
            "tokenizer in tokenizer.path"
        )
    return tokens


# -- packed and rows ---------------------------------------------------------------------------------------------------


def _open_stream(
    config: TrainConfig, data: PackedDataSpec | RowsDataSpec, tokenizer: Tokenizer, revision: str
) -> RunData:
    documents = training_documents(data, revision)
    if next(iterate(documents), None) is None:  # a wrong field or an empty file is found before anything is written
        raise UserError(f"data.dataset_name = {data.dataset_name!r} holds no text to train on; check it")
    shared: dict[str, Any] = {
        "documents": documents,
        "encode": partial(tokenizer.encode_batch, allowed_special="none"),  # a document cannot end itself
        "eot_id": tokenizer.eot_id,
        "context_length": config.model.context_length,
        "samples_per_step": _samples_per_step(config),
        "device_batch_size": config.training.device_batch_size,
        "seed": config.run.seed,
    }

    def source(rank: int, world_size: int) -> Source:
        match data:
            case PackedDataSpec():
                return PackedSource(**shared, spec=data, rank=rank, world_size=world_size)
            case RowsDataSpec():
                return RowsSource(**shared, spec=data, rank=rank, world_size=world_size)

    validation = _open_validation(data, tokenizer, revision)
    inputs = {"train": documents.identity, "revision": revision, **_identities(validation)}
    return RunData(source, validation, inputs)


def _open_texts(data: StreamDataSpec, name: str, tokenizer: Tokenizer, revision: str) -> HeldOut | None:
    match name:
        case "val" | "test":
            texts = held_out_texts(data, name, revision)
        case _:
            where = data.validation_sets.get(name)
            texts = named_texts(data, where, revision) if where else None
    if texts == []:
        raise UserError(
            f"the set {name!r} of data.dataset_name = {data.dataset_name!r} holds no documents; where it is a "
            "share of few documents, raise data.validation_fraction, or cut them with data.max_document_characters"
        )
    return HeldOutTexts(f"{name} of {data.dataset_name}", texts, tokenizer) if texts else None


# -- shared ------------------------------------------------------------------------------------------------------------


def _open_validation(data: DataSpec, tokenizer: Tokenizer, revision: str = "") -> dict[str, HeldOut]:
    sets = {name: open_held_out(data, name, tokenizer, revision) for name in (MAIN, *data.validation_sets)}
    return {name: held_out for name, held_out in sets.items() if held_out is not None}


def _identities(validation: Mapping[str, HeldOut]) -> dict[str, Any]:
    named = {name: held_out.identity for name, held_out in validation.items() if name != MAIN}
    return {"val": validation[MAIN].identity if MAIN in validation else "", "validation_sets": named}


def _samples_per_step(config: TrainConfig) -> int:
    return config.training.total_batch_size // config.model.context_length
