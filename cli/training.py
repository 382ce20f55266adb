"""From a training configuration to a finished run: composes tokenizer, data, model, task and log around the loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from config.loading import resolved
from config.schemas import TrainConfig
from trainkit.artifacts import publish_file
from trainkit.checkpoints import CheckpointStore, find_newest_intact, load_snapshot
from trainkit.data.megatron import IndexedTokens
from trainkit.data.prefetch import prefetch
from trainkit.data.windows import MegatronSource
from trainkit.distribution import World, open_world, wait_for_all
from trainkit.errors import EXIT_NON_FINITE, EXIT_REQUEUE, UserError
from trainkit.interrupts import Interrupts, catch_interrupts
from trainkit.logging.run_log import FileLog, NullLog, open_run_log
from trainkit.loop import DataState, Result, Run, samples_per_step, train
from trainkit.run_directory import Status, create_run_directory, write_status, write_summary
from trainkit.task import Batch, RunFacts
from transformerlm.evaluation.likelihood import score_documents
from transformerlm.inference.predictor import Predictor
from transformerlm.models.build import create_model
from transformerlm.models.files import write_model_json
from transformerlm.models.sizes import flops_per_token
from transformerlm.objectives.build import build_objective
from transformerlm.tokenizer.tokenizer import Tokenizer

EXIT_CODES = {"finished": 0, "preempted": EXIT_REQUEUE, "non-finite": EXIT_NON_FINITE}
STATUS: Mapping[str, Status] = {"finished": "finished", "preempted": "preempted", "non-finite": "failed"}


@dataclass(frozen=True)
class Ingredients:
    """What a run is made of, opened and checked before anything is written."""

    config: TrainConfig
    tokenizer: Tokenizer
    train_tokens: IndexedTokens
    val_tokens: IndexedTokens | None


def run_directory(config: TrainConfig) -> Path:
    return Path(config.run.dir) / config.run.name


def train_from_config(config: TrainConfig, *, config_toml: str | None = None, resume: bool = False) -> Result:
    """Train (or go on training) the run that `config` describes; every rank calls it."""
    ingredients = open_ingredients(config)
    with open_world(config.training) as world, catch_interrupts() as interrupts:
        directory = run_directory(config)
        if world.is_main:
            create_run_directory(directory, config_json=resolved(config), config_toml=config_toml, resume=resume)
        wait_for_all(world)
        with _status_of(directory, world) as report:
            result = _train(ingredients, directory, world, interrupts)
            report(result)
    return result


def open_ingredients(config: TrainConfig) -> Ingredients:
    """Open tokenizer and data, and refuse what does not fit together."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    prefixes = config.data.megatron_train_prefix, config.data.megatron_val_prefix
    train_tokens, val_tokens = (IndexedTokens.open(prefix) if prefix else None for prefix in prefixes)
    assert train_tokens is not None
    for tokens in (train_tokens, val_tokens):
        if tokens is not None:
            _check_tokenizer(tokens, tokenizer, config.tokenizer.path)
    return Ingredients(config, tokenizer, train_tokens, val_tokens)


def _check_tokenizer(tokens: IndexedTokens, tokenizer: Tokenizer, path: str) -> None:
    tokens.check_vocabulary(tokenizer.vocab_size)
    made_with = tokens.manifest.tokenizer if tokens.manifest else ""
    if made_with and made_with != tokenizer.content_hash:
        raise UserError(
            f"{tokens.prefix} was made with another tokenizer than {path}; make the files again with "
            "transformerlm-make-data, or name their tokenizer in tokenizer.path"
        )


def _train(ingredients: Ingredients, directory: Path, world: World, interrupts: Interrupts) -> Result:
    config, tokenizer = ingredients.config, ingredients.tokenizer
    notes: list[str] = []
    store = CheckpointStore(
        directory / "checkpoints", config.checkpoint, _asset_writer(config, tokenizer), notes.append
    )
    newest = find_newest_intact(store)
    snapshot = load_snapshot(newest) if newest else None
    offset = snapshot.trainer["log_offset"] if snapshot else 0
    with closing(_open_log(directory, config, offset, world)) as log:
        for note in notes:
            log.message(note)
        if newest:
            log.message(f"resuming from {newest}")
        run = _compose(ingredients, store, world, log, interrupts)
        result = train(run, resume=snapshot)
        log.message(_last_words(result, directory))
    return result


def _open_log(directory: Path, config: TrainConfig, offset: int, world: World) -> FileLog | NullLog:
    if not world.is_main:
        return NullLog()
    return open_run_log(directory, config.logging, total_steps=config.training.max_steps, continue_at=offset)


def _compose(
    ingredients: Ingredients, store: CheckpointStore, world: World, log: FileLog | NullLog, interrupts: Interrupts
) -> Run:
    config, tokenizer = ingredients.config, ingredients.tokenizer
    facts = RunFacts(
        unit_name="tokens",
        units_per_sample=config.model.context_length,
        flops_per_unit=flops_per_token(config.model, tokenizer.vocab_size),
    )
    source = MegatronSource(
        data=ingredients.train_tokens,
        context_length=config.model.context_length,
        samples_per_step=samples_per_step(config.training, facts),
        device_batch_size=config.training.device_batch_size,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
    )
    return Run(
        model=create_model(config.model, vocab_size=tokenizer.vocab_size, seed=config.run.seed),
        task=build_objective(config.objective, config.model),
        source=Prefetched(source, config.data.prefetch),
        training=config.training,
        optimizer=config.optimizer,
        schedule=config.schedule,
        world=world,
        log=log,
        facts=facts,
        checkpoints=store,
        evaluate=_evaluator(ingredients, world),
        sample=_sampler(config, tokenizer, log) if world.is_main else None,
        stop_requested=lambda: interrupts.requested,
    )


@dataclass(frozen=True)
class Prefetched:
    """A source that a background thread reads ahead of the loop."""

    source: MegatronSource
    depth: int

    def steps(self, state: DataState | None) -> Generator[tuple[list[Batch], DataState]]:
        return prefetch(self.source.steps(state), self.depth)


def _evaluator(ingredients: Ingredients, world: World) -> Callable[[nn.Module, int], Mapping[str, float]] | None:
    """Scores the validation documents: nats per token and bits per byte."""
    config, tokenizer, tokens = ingredients.config, ingredients.tokenizer, ingredients.val_tokens
    if tokens is None:
        return None
    count = min(len(tokens), config.evaluation.max_documents or len(tokens))
    byte_lengths = tokenizer.byte_lengths()

    def evaluate(model: nn.Module, step: int) -> Mapping[str, float]:
        del step
        raise NotImplementedError

    return evaluate


def _sampler(config: TrainConfig, tokenizer: Tokenizer, log: FileLog | NullLog) -> Callable[[nn.Module, int], None]:
    raise NotImplementedError


def _asset_writer(config: TrainConfig, tokenizer: Tokenizer) -> Callable[[Path], None]:
    """A checkpoint is complete: it carries the model's description and the tokenizer."""

    def write(directory: Path) -> None:
        write_model_json(directory, config.model, vocab_size=tokenizer.vocab_size)
        tokenizer.save(directory / "tokenizer")

    return write
