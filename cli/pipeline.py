"""`transformerlm-pipeline`: text → tokenizer → token files → training → evaluation → stories, in one command.

Each stage leaves an artifact behind and is skipped while that artifact matches the configuration and its inputs. A run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli import layout, stages
from cli.common import Command, configuration_file, run_command
from cli.stages import say
from config.loading import Loaded
from config.rendering import to_toml
from config.schemas import RESERVED_SETS, PipelineConfig, TrainConfig
from trainkit.data.specs import MegatronDataSpec
from trainkit.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from trainkit.data.splits import Split
    from transformerlm.tokenizer.tokenizer import Tokenizer


SPLITS: tuple[Split, ...] = ("train", "val", "test")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[PipelineConfig], arguments: argparse.Namespace) -> int:
    from cli.shards import check_text

    config = loaded.config
    layout.prepare(config, arguments)
    check_text(config.corpus)
    force, verify = arguments.force, arguments.verify
    miss_other_run(config, force=force)
    tokenizer_path, tokenizer = make_tokenizer(
        config, force=force, retrain=arguments.force_retrain_tokenizer, verify=verify
    )
    prefixes = make_token_files(config, tokenizer, force=force, verify=verify)
    train_config = config.train_config(
        tokenizer_path=str(tokenizer_path),
        train_prefix=prefixes["train"],
        val_prefix=prefixes.get("val", ""),
        test_prefix=prefixes.get("test", ""),
    )
    training = Loaded(train_config, loaded.origins, loaded.source)
    written = Path(config.artifacts.dir) / "train.toml"
    exit_code = train_model(training, written, force=force, verify=verify, new_horizon=arguments.new_horizon)
    if exit_code == 0:
        report(train_config)
    return exit_code


def miss_other_run(config: PipelineConfig, *, force: bool) -> None:
    """Refuse a run that would begin with another that does not exist, before anything is made or set aside.

    One that has a remote home may go on from there; whether it does is found out later.
    """
    from trainkit.beginnings import check_beginning
    from trainkit.run_directory import holds_run

    begins = force or not holds_run(Path(config.run.dir) / config.run.name)
    if begins and not config.checkpoint.remote:
        check_beginning(config.checkpoint)


def make_tokenizer(config: PipelineConfig, *, force: bool, retrain: bool, verify: bool) -> tuple[Path, Tokenizer]:
    """The tokenizer of the configuration: an existing one by its path, one that runs share, or one trained here on the
    training split."""
    from cli.corpora import fingerprint, open_documents, require_documents

    if config.tokenizer.path:
        if retrain:
            raise UserError(
                "tokenizer.path names a tokenizer to use as it is; leave out --force-retrain-tokenizer", EXIT_USAGE
            )
        return existing_tokenizer(Path(config.tokenizer.path))
    shared = config.artifacts.tokenizer_dir
    path = Path(shared or Path(config.artifacts.dir) / "tokenizer")
    if shared and not (force or retrain) and path.is_dir() and any(path.iterdir()):
        stages.require_same_settings(path, config.tokenizer)
        return existing_tokenizer(path)
    tokenizer = stages.make_tokenizer(
        path,
        config.tokenizer,
        lambda: require_documents(open_documents(config.corpus, "train"), "the training split"),
        fingerprint(config.corpus, "train"),
        force=force or retrain,
        verify=verify,
    )
    return path, tokenizer


def existing_tokenizer(path: Path) -> tuple[Path, Tokenizer]:
    from transformerlm.tokenizer.specs import END_OF_TEXT
    from transformerlm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise UserError(f"the tokenizer {path} has no {END_OF_TEXT}, which ends each document; choose another")
    say("tokenizer", f"{path}, as it is")
    return path, tokenizer


def make_token_files(config: PipelineConfig, tokenizer: Tokenizer, *, force: bool, verify: bool) -> dict[Split, str]:
    """Token files of each split that the corpus has; returns their prefixes."""
    from cli.corpora import has_split
    from cli.make_data import ProgressLine
    from cli.token_files import build_token_files

    prefixes: dict[Split, str] = {}
    shared = config.artifacts.tokens_dir
    folder = Path(shared or Path(config.artifacts.dir) / "tokens")
    kept_apart_by = "--experiment" if shared else "artifacts.dir"
    for split in SPLITS:
        if not has_split(config.corpus, split):
            continue
        prefix, start = folder / split, time.monotonic()
        earlier = _corpus_of(prefix)
        line = ProgressLine(str(prefix))
        try:
            made = build_token_files(
                config.corpus,
                split,
                tokenizer,
                prefix,
                dtype=config.artifacts.dtype,
                force=force,
                check=verify,
                progress=line,
            )
        finally:
            line.close()
        how = "up to date" if made.reused else f"in {time.monotonic() - start:.1f} s"
        if not made.reused and not force and earlier is not None:
            what = stages.changes("corpus", earlier, dataclasses.asdict(config.corpus)) or "other text or tokenizer"
            how += f", in place of earlier ones ({what}; another {kept_apart_by} keeps both)"
        say("data", f"{prefix}: {made.manifest.documents:,} documents, {made.manifest.tokens:,} tokens, {how}")
        prefixes[split] = str(prefix)
    return prefixes


def _corpus_of(prefix: Path) -> dict[str, Any] | None:
    """The `[corpus]` settings that token files were made with; None where there are no sound ones."""
    from trainkit.data.token_manifest import read_manifest

    try:
        manifest = read_manifest(prefix)
    except UserError:
        return None
    return dict(manifest.source.get("corpus", {})) if manifest else None


def train_model(loaded: Loaded[TrainConfig], written: Path, *, force: bool, verify: bool, new_horizon: bool) -> int:
    """Train, go on training, or find that it is done; returns the exit code. The configuration goes to `written`."""
    from cli.training import EXIT_CODES, is_finished, run_directory, train_from_config
    from trainkit.artifacts import make_directory, publish_file, verify_directory
    from trainkit.run_directory import set_aside

    config, toml = loaded.config, to_toml(loaded)
    directory = run_directory(config)
    make_directory(written.parent)
    publish_file(written, toml)
    if force:
        set_aside(directory)
    if is_finished(config):
        say("training", f"{directory} is finished")
        if verify:
            verify_directory(directory / "checkpoints" / "latest")
        return 0
    say("training", f"{directory}; {written} is its configuration")
    result = train_from_config(config, config_toml=toml, resume=True, new_horizon=new_horizon)
    return EXIT_CODES[result.status]


def report(config: TrainConfig) -> None:
    """Score the best checkpoint and tell stories with it, unless `summary.json` says it all; then show it."""
    from cli.training import run_directory
    from trainkit.run_directory import finite, read_summary, write_summary

    directory = run_directory(config)
    summary = read_summary(directory)
    if "stories" not in summary:
        assert isinstance(config.data, MegatronDataSpec)
        sets = {"val": config.data.megatron_val_prefix, "test": config.data.megatron_test_prefix}
        for name in (*(name for name, prefix in sets.items() if prefix), *config.data.validation_sets):
            summary |= _score(config, directory, name)
        summary["stories"] = _tell_stories(config, directory)
        write_summary(directory, summary)
    if sys.stdout.isatty():
        print(_describe(summary, directory), flush=True)
    else:
        print(json.dumps({"kind": "summary", "run": str(directory), **finite(summary)}, allow_nan=False), flush=True)


def _describe(summary: dict[str, Any], directory: Path) -> str:
    rows = [
        ("val_loss", "loss", "{:.4f} nats per token"),
        ("val_perplexity", "perplexity", "{:.3f}"),
        ("val_bits_per_byte", "bits per byte", "{:.4f}"),
        ("test_loss", "test loss", "{:.4f} nats per token"),
        ("excess_ratio", "excess", "{:.1%} above the best loss that any model can reach"),
    ]
    rows += [(key, key.removeprefix("val_"), "{:.4f}") for key in summary if key.startswith("val_loss/")]
    lines = [f"{label:<15}{form.format(summary[name])}" for name, label, form in rows if summary.get(name) is not None]
    for story in summary["stories"]:
        lines += ["-" * 80, story]
    lines += ["-" * 80, f"plots    {directory}/plots", f"samples  {directory}/samples.md"]
    lines += [f"more     uv run transformerlm-infer --checkpoint {directory} --interactive"]
    return "\n".join(["", *lines])


def _weights(config: TrainConfig) -> Literal["raw", "ema"]:
    """What validation chose the best checkpoint by."""
    return "ema" if config.training.ema_decay else "raw"


def _score(config: TrainConfig, directory: Path, name: str) -> dict[str, Any]:
    """What `transformerlm-eval` says of the best checkpoint on one set of documents."""
    from cli.eval import evaluate_checkpoint
    from config.specs import CheckpointEvaluationSpec, RunEvaluationDataSpec

    spec = CheckpointEvaluationSpec(
        checkpoint=str(directory),
        weights=_weights(config),
        device=config.training.device,
        **dataclasses.asdict(config.evaluation),
    )
    found = evaluate_checkpoint(spec, RunEvaluationDataSpec(set=name))
    values: dict[str, Any] = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "documents": found.documents,
    }
    if name in RESERVED_SETS:
        values = {f"{name}_{metric}": value for metric, value in values.items()}
    else:
        values = {f"val_{metric}/{name}": value for metric, value in values.items()}
    if name == "val" and found.grammar is not None:
        values |= {"excess_ratio": found.grammar.excess, "excess_nats_per_story": found.grammar.excess_nats}
        values |= {"excess_standard_error": found.grammar.standard_error}
    return values


def _tell_stories(config: TrainConfig, directory: Path) -> list[str]:
    if not config.inference.prompts:
        return []
    from cli.training import tell
    from transformerlm.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(directory, device=config.training.device, weights=_weights(config))
    modes = predictor.reading.modes
    return [text for mode in modes for text in tell(predictor, config.inference, config.run.seed, mode)]


def _adapt(arguments: argparse.Namespace) -> None:
    layout.choose_profile(arguments)
    arguments.layers = layout.settings_of_flags(arguments, configuration_file(COMMAND, arguments))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    layout.add_arguments(parser)
    parser.add_argument("--force", action="store_true", help="make everything again; an earlier run is set aside")
    parser.add_argument("--verify", action="store_true", help="check what is reused against its SHA-256")
    parser.add_argument(
        "--new-horizon",
        action="store_true",
        help="let it go on with another training.max_steps than it began with",
    )


COMMAND = Command(
    name="transformerlm-pipeline",
    summary="From text to a trained model and its stories in one command: tokenizer, token files, training, "
    "evaluation, samples. A stage whose result matches the configuration and its inputs is skipped; an interrupted run "
    "goes on.",
    schema=PipelineConfig,
    default_config="quickstart",
    run=run,
    examples=(
        "--config config/resources/quickstart.toml",
        "--config-name tinystories corpus.kind=files 'corpus.train_paths=[\"train.jsonl\"]' "
        "'corpus.val_paths=[\"val.jsonl\"]'",
        "--config my.toml training.max_steps=2000 --force",
        "--profile local --input data/input.txt --run-dir runs/local-smoke",
        "--mode cloud --profile runpod_2b --input /workspace/datasets/train/fineweb --run-dir runs/fineweb-2b",
    ),
    useful=("run.name", "corpus.kind", "tokenizer.vocab_size", "model.num_layers", "training.max_steps"),
    flags={"--max-steps": "training.max_steps", "--device": "training.device", "--name": "run.name"},
    add_arguments=_add_arguments,
    adapt=_adapt,
)


if __name__ == "__main__":
    raise SystemExit(main())
