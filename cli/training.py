"""From a training configuration to a finished run: composes tokenizer, data, model, task and log around the loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cli.data_sources import RunData, open_run_data, pinned_revision
from cli.rehearsal import rehearsed
from cli.validation import MAIN, build_evaluator
from config.loading import resolved
from config.schemas import TrainConfig
from config.specs import SamplesSpec
from profiling.recorder import Recorder
from trainkit.beginnings import Beginning, choose_beginning, load_beginning
from trainkit.checkpoints import CheckpointStore, load_model_tensors, load_weights
from trainkit.distribution import World, choose_device, main_first, open_world
from trainkit.errors import EXIT_NON_FINITE, EXIT_REQUEUE, EXIT_USAGE, UserError
from trainkit.interrupts import Interrupts, catch_interrupts
from trainkit.launch import launch, processes_to_start
from trainkit.logging.run_log import FileLog, NullLog, open_run_log
from trainkit.loop import Result, Run, train
from trainkit.precision import resolve_precision
from trainkit.run_directory import (
    HORIZON,
    MAY_CHANGE,
    Status,
    changed_settings,
    create_run_directory,
    hold_run_directory,
    holds_run,
    read_config,
    read_status,
    read_summary,
    withdraw_run,
    write_status,
    write_summary,
)
from trainkit.task import RunFacts
from trainkit.watchdog import Watchdog
from transformerlm.inference.predictor import Predictor
from transformerlm.models.build import create_model, empty_model
from transformerlm.models.files import write_model_json
from transformerlm.models.sizes import flops_per_token
from transformerlm.models.specs import Mode
from transformerlm.models.transformer import Transformer
from transformerlm.objectives.build import NoiseContext, Objective, build_objective, passes_per_token, reading_of
from transformerlm.tokenizer.text_ids import checked_mask_id, ids_without_text
from transformerlm.tokenizer.tokenizer import Tokenizer

EXIT_CODES = {"finished": 0, "preempted": EXIT_REQUEUE, "non-finite": EXIT_NON_FINITE}
STATUS: Mapping[str, Status] = {"finished": "finished", "preempted": "preempted", "non-finite": "failed"}


@dataclass(frozen=True)
class Ingredients:
    """What a run is made of, opened and checked before anything is written."""

    config: TrainConfig
    tokenizer: Tokenizer
    data: RunData


def run_directory(config: TrainConfig) -> Path:
    return Path(config.run.dir) / config.run.name


def train_from_config(
    config: TrainConfig,
    *,
    config_toml: str | None = None,
    resume: bool = False,
    new_horizon: bool = False,
    prepare: Callable[[], object] = lambda: None,
) -> Result:
    """Train (or go on training) the run that `config` describes; every rank calls it.

    `new_horizon` lets a run go on with another `training.max_steps` than it began with. `prepare` makes what the
    configuration names and is not there yet; the first rank calls it, the others wait.
    """
    processes = processes_to_start(config.distributed, config.training.device)
    if processes > 1:
        prepare()
        settings = {"config_toml": config_toml, "resume": resume, "new_horizon": new_horizon}
        return launch(processes, train_from_config, config, **settings)
    directory = run_directory(config)
    with open_world(config.training) as world, catch_interrupts() as interrupts, ExitStack() as held:
        main_first(prepare, world)
        config = for_this_machine(config)
        is_sought = not config.training.device_batch_size
        config = _rehearsed(config, world)
        notes = [f"training.device_batch_size is {config.training.device_batch_size}"] if is_sought else []
        revision = main_first(lambda: pinned_revision(config.data, read_config(directory)), world)
        ingredients = open_ingredients(config, revision)

        def claim() -> bool:
            """Whether this begins the run."""
            ingredients.data.verify()
            held.enter_context(hold_run_directory(directory))
            is_new = not holds_run(directory)
            create_run_directory(
                directory,
                config_json=recorded(ingredients),
                config_toml=config_toml,
                resume=resume,
                allow=HORIZON if new_horizon else (),
            )
            return is_new

        is_new = main_first(claim, world)
        refused = _withdrawn_if_refused(directory) if is_new and world.is_main else nullcontext()
        with _status_of(directory, world) as report, refused:
            result = _train(ingredients, directory, world, interrupts, notes, new_horizon=new_horizon)
            report(result)
    return result


def for_this_machine(config: TrainConfig) -> TrainConfig:
    """Replace `auto` where it decides about numbers; a run that exists keeps what it began with.

    A new run's `training.device_batch_size = 0` remains: only a trial can tell.
    """
    training = config.training
    if training.precision != "auto" and training.device_batch_size:
        return config
    began_with = read_config(run_directory(config)).get("training", {})
    precision, rows = training.precision, training.device_batch_size
    if precision == "auto":
        device = choose_device(training.device, local_rank=0)
        precision = began_with.get("precision") or resolve_precision("auto", device)
    rows = rows or began_with.get("device_batch_size", 0)
    return config.model_copy(update={"training": replace(training, precision=precision, device_batch_size=rows)})


def _rehearsed(config: TrainConfig, world: World) -> TrainConfig:
    """Tried on made-up text, before a byte of the data is asked for."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    objective = task_of(config, tokenizer, world.device)

    def build() -> Transformer:
        model = empty_model(config.model, vocab_size=tokenizer.vocab_size, device=world.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        return _recomputing(model, config)

    return rehearsed(config, objective, world, build)


def recorded(ingredients: Ingredients) -> dict[str, Any]:
    """What `config.json` holds: every setting, and the identity of what the paths among them led to."""
    inputs = {"tokenizer": ingredients.tokenizer.content_hash, **ingredients.data.inputs}
    return {**resolved(ingredients.config), "inputs": inputs}


def open_ingredients(config: TrainConfig, revision: str) -> Ingredients:
    """Open tokenizer and data (of the hub at `revision`), and refuse what does not fit together."""
    tokenizer = Tokenizer.load(config.tokenizer.path)
    _check_prompts(config, tokenizer)
    data = open_run_data(config, tokenizer, revision)
    data.source(0, 1)  # refuses what no rank could read
    if "diffusion" in reading_of(config.objective).modes:
        checked_mask_id(tokenizer)
    return Ingredients(config, tokenizer, data)


def _check_prompts(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """The samples come at the end of a long run; whether their prompts fit is known now."""
    longest = max((tokenizer.count(prompt, allowed_special="none") for prompt in config.inference.prompts), default=0)
    # On a diffusion model's canvas the end-of-text token that begins the document has a place of its own.
    room = config.model.context_length - ("diffusion" in reading_of(config.objective).modes)
    limit = config.inference.total_length or room
    if longest >= limit:
        raise UserError(
            f"a prompt of inference.prompts has {longest} tokens, but inference.total_length leaves room for less than "
            f"{limit} of prompt and continuation; shorten the prompt",
            EXIT_USAGE,
        )


def _train(
    ingredients: Ingredients,
    directory: Path,
    world: World,
    interrupts: Interrupts,
    notes: list[str],
    *,
    new_horizon: bool,
) -> Result:
    config, tokenizer = ingredients.config, ingredients.tokenizer
    store = CheckpointStore(
        directory / "checkpoints", config.checkpoint, _asset_writer(config, tokenizer), notes.append
    )
    beginning = main_first(lambda: _choose_beginning(store, tokenizer), world)
    snapshot = load_beginning(beginning, store, max_steps=config.training.max_steps, new_horizon=new_horizon)
    trainer = snapshot.trainer if snapshot else {}
    with closing(_open_log(directory, config, trainer, world)) as log:
        if MAIN not in ingredients.data.validation:
            notes.append("there is no validation text: no validation loss, no best checkpoint")
        for note in (*notes, str(beginning)):
            log.message(note, trainer.get("step", 0))
        run = compose(ingredients, directory, store, world, log, interrupts)
        if beginning.kind == "weights":
            load_model_tensors(run.model, load_weights(beginning.path), str(beginning.path))
        result = train(run, resume=snapshot)
        log.message(_last_words(result, directory), result.step)
    return result


def _choose_beginning(store: CheckpointStore, tokenizer: Tokenizer) -> Beginning:
    """Another tokenizer's ids mean other text, even where the shapes of the weights are the same."""
    beginning = choose_beginning(store)
    its_own = beginning.path / "tokenizer"
    is_foreign = beginning.kind in ("other run", "weights")
    if is_foreign and Tokenizer.load(its_own).content_hash != tokenizer.content_hash:
        raise UserError(
            f"{beginning.path} was trained with another tokenizer than tokenizer.path; set tokenizer.path = {its_own}",
            EXIT_USAGE,
        )
    return beginning


def _open_log(directory: Path, config: TrainConfig, trainer: Mapping[str, Any], world: World) -> FileLog | NullLog:
    """`trainer`: of the checkpoint that the run goes on from; empty where there is none."""
    if not world.is_main:
        return NullLog()
    return open_run_log(
        directory,
        config.logging,
        total_steps=config.training.max_steps,
        continue_at=trainer.get("log_offset", 0),
        loggers=trainer.get("loggers"),
    )


def compose(
    ingredients: Ingredients,
    directory: Path,
    store: CheckpointStore,
    world: World,
    log: FileLog | NullLog,
    interrupts: Interrupts,
) -> Run:
    """All that the loop needs."""
    config, tokenizer = ingredients.config, ingredients.tokenizer
    objective = task_of(config, tokenizer, world.device)
    return Run(
        model=_create_model(config, tokenizer),
        task=objective,
        source=ingredients.data.source(world.rank, world.size),
        prepare=objective.prepare,
        prefetch=config.data.prefetch,
        training=config.training,
        optimizer=config.optimizer,
        schedule=config.schedule,
        world=world,
        log=log,
        logging=config.logging,
        facts=_facts(config, tokenizer),
        checkpoints=store,
        evaluate=build_evaluator(config, tokenizer, ingredients.data.validation, world),
        sample=_sampler(config, tokenizer, log) if world.is_main and config.inference.prompts else None,
        stop_requested=lambda: interrupts.requested,
        watchdog=_watchdog(config, directory, world),
        distributed=config.distributed,
        recorder=Recorder(config.profiling, directory / "profile", rank=world.rank, tell=log.message),
    )


def task_of(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> Objective:
    """What the run trains for."""
    return build_objective(config.objective, config.model, _noise(config, tokenizer, device))


def _create_model(config: TrainConfig, tokenizer: Tokenizer) -> Transformer:
    return _recomputing(create_model(config.model, vocab_size=tokenizer.vocab_size, seed=config.run.seed), config)


def _recomputing(model: Transformer, config: TrainConfig) -> Transformer:
    if config.training.activation_checkpointing == "blocks":
        model.recompute_blocks()
    return model


def _noise(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> NoiseContext | None:
    if "diffusion" not in reading_of(config.objective).modes:
        return None
    return NoiseContext(
        mask_id=checked_mask_id(tokenizer),
        forbidden=torch.from_numpy(ids_without_text(tokenizer)).to(device),
        samples_per_step=config.training.total_batch_size // config.model.context_length,
        max_steps=config.training.max_steps,
        seed=config.run.seed,
    )


def _watchdog(config: TrainConfig, directory: Path, world: World) -> Watchdog:
    def alarmed(text: str) -> None:
        write_status(directory, "failed", step=read_status(directory).get("step", 0), message=text)

    return Watchdog(config.distributed.watchdog_seconds, rank=world.rank, alarmed=alarmed)


def _facts(config: TrainConfig, tokenizer: Tokenizer) -> RunFacts:
    return RunFacts(
        unit_name="tokens",
        units_per_sample=config.model.context_length,
        flops_per_unit=flops_per_token(config.model, tokenizer.vocab_size) * passes_per_token(config.objective),
    )


def _sampler(config: TrainConfig, tokenizer: Tokenizer, log: FileLog | NullLog) -> Callable[[nn.Module, int], None]:
    """Continues the prompts of `[inference]`, in each way that the model writes, and logs the texts."""
    settings, reading = config.inference, reading_of(config.objective)

    def sample(model: nn.Module, step: int) -> None:
        assert isinstance(model, Transformer)
        predictor = Predictor(model, tokenizer, reading)
        for mode in reading.modes:
            for prompt, text in zip(settings.prompts, tell(predictor, settings, config.run.seed, mode), strict=True):
                log.write({"kind": "sample", "step": step, "mode": mode, "prompt": prompt, "text": text})

    return sample


def tell(predictor: Predictor, settings: SamplesSpec, seed: int, mode: Mode) -> list[str]:
    """Each prompt of `[inference]` with its continuation."""
    texts = predictor.generate_batch(
        settings.prompts,
        total_length=settings.total_length,
        mode=mode,
        sampling=settings,
        denoising=settings,
        seed=seed,
    )
    return [prompt + text for prompt, text in zip(settings.prompts, texts, strict=True)]


def _asset_writer(config: TrainConfig, tokenizer: Tokenizer) -> Callable[[Path], None]:
    """A checkpoint is complete: it carries the model's description and the tokenizer."""

    def write(directory: Path) -> None:
        reading = reading_of(config.objective)
        write_model_json(directory, config.model, vocab_size=tokenizer.vocab_size, reading=reading)
        tokenizer.save(directory / "tokenizer")

    return write


def _last_words(result: Result, directory: Path) -> str:
    best = "; best {metric} {value:.4f} at step {step}".format(**result.best) if result.best else ""
    match result.status:
        case "finished":
            return f"finished at step {result.step}{best}; see {directory}/plots and {directory}/samples.md"
        case "preempted":
            return (
                f"stopped at step {result.step} and saved{best}; "
                "run the same command again to go on (transformerlm-train needs --resume)"
            )
        case "non-finite":
            return f"gave up at step {result.step}{best}"


@contextmanager
def _withdrawn_if_refused(directory: Path) -> Generator[None]:
    """Where to begin, and what fits together, is known only when the directory is there."""
    try:
        yield
    except UserError:
        withdraw_run(directory)
        raise


@contextmanager
def _status_of(directory: Path, world: World) -> Generator[Callable[[Result], None]]:
    """Keep `status.json` true however the block ends; `report` tells how it ended well."""
    if not world.is_main:
        yield lambda result: None
        return

    def report(result: Result) -> None:
        summary = {"status": result.status, "step": result.step, "best": result.best}
        known = read_summary(directory)
        if all(known.get(name, value) == value for name, value in summary.items()):
            summary |= known  # a run that was finished before: what has been measured of it since is still true
        # The status last: it says that everything is there.
        write_summary(directory, summary)
        write_status(directory, STATUS[result.status], step=result.step)

    try:
        yield report
    except BaseException as error:
        step = read_status(directory).get("step", 0)
        write_status(directory, "failed", step=step, message=f"{type(error).__name__}: {error}")
        raise


def is_finished(config: TrainConfig) -> bool:
    """Whether the run is done and was made with this configuration and these inputs, but for what may change."""
    directory = run_directory(config)
    if read_status(directory).get("status") != "finished":
        return False
    began_with = read_config(directory)
    revision = pinned_revision(config.data, began_with)
    now = json.loads(json.dumps(recorded(open_ingredients(for_this_machine(config), revision))))
    return not changed_settings(began_with, now, MAY_CHANGE)
