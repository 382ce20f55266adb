"""`transformerlm-train`: a model from a tokenizer and token files, or straight from text."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cli.common import Command, run_command
from config.loading import Loaded
from config.rendering import to_toml
from config.schemas import TrainConfig
from trainkit.data.specs import DataSpec, MegatronDataSpec
from trainkit.errors import EXIT_USAGE, UserError


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[TrainConfig], arguments: argparse.Namespace) -> int:
    config = loaded.config
    if arguments.text is not None and not Path(arguments.text).exists():
        raise UserError(f"--text {arguments.text} does not exist; check the path")
    check_paths(config.data, tokenizer=None if arguments.text else config.tokenizer.path)
    run_directory = Path(config.run.dir) / config.run.name
    if arguments.resume and not (run_directory / "config.json").exists():
        _say(f"there is no run in {run_directory} to resume: a new one starts")
    if not arguments.text:
        return _train(loaded, arguments)
    from cli.text import VOCAB_SIZE, describe, prepare_tokenizer

    _say(describe(config))
    return _train(
        loaded,
        arguments,
        prepare=lambda: prepare_tokenizer(config, arguments.vocab_size or VOCAB_SIZE),
    )


def check_paths(data: DataSpec, tokenizer: str | None) -> None:
    """Refuse files that are not there before PyTorch is imported, which takes seconds; training checks the rest."""
    match data:
        case MegatronDataSpec():
            named = [data.megatron_train_prefix, *data.blend_prefixes, data.megatron_val_prefix]
            for prefix in filter(None, [*named, *data.validation_sets.values()]):
                if not (Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file()):
                    from trainkit.data.megatron import IndexedTokens

                    IndexedTokens.open(prefix)
        case _:
            from cli.text_sources import check_local

            check_local(data)
    if tokenizer is not None and not Path(tokenizer).exists():
        raise UserError(
            f"tokenizer.path = {tokenizer} does not exist; name a tokenizer, or train one with "
            "uv run transformerlm-train-tokenizer"
        )


def _say(text: str) -> None:
    """Once, however many ranks torchrun has started."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{COMMAND.name}: {text}", file=sys.stderr, flush=True)


def _train(
    loaded: Loaded[TrainConfig], arguments: argparse.Namespace, prepare: Callable[[], object] = lambda: None
) -> int:
    from cli.training import EXIT_CODES, train_from_config

    result = train_from_config(
        loaded.config,
        config_toml=to_toml(loaded),
        resume=arguments.resume,
        new_horizon=arguments.new_horizon,
        prepare=prepare,
    )
    return EXIT_CODES[result.status]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", metavar="PATH", help="train on this file or folder of text; makes the tokenizer, too")
    add("--vocab-size", type=int, metavar="N", help="size of the tokenizer that --text makes (2048)")
    add("--resume", action="store_true", help="go on from the run's newest intact checkpoint; without one, start")
    add("--new-horizon", action="store_true", help="let it go on with another training.max_steps than it began with")


def _adapt(arguments: argparse.Namespace) -> None:
    if arguments.text is None:
        if arguments.vocab_size is not None:
            raise UserError("--vocab-size is the size of the tokenizer that --text makes: give --text", EXIT_USAGE)
        return
    from cli.text import CONFIG, text_settings

    has_config = arguments.config is not None or arguments.config_name is not None
    if not has_config:
        arguments.config_name = CONFIG
    arguments.assignments = [*text_settings(arguments.text, named_by_text=not has_config), *arguments.assignments]


COMMAND = Command(
    name="transformerlm-train",
    summary="Train a model on token files, on a stream of text from the Hugging Face hub or from your files, or, with "
    "--text, on a file or folder of text and nothing else. One process, or several under torchrun. Stop it with Ctrl-C "
    "and continue with --resume: not a bit is lost.",
    schema=TrainConfig,
    default_config="train",
    run=run,
    examples=(
        "--text my.txt",
        "--config config/resources/train.toml",
        "model.depth=6 training.device_batch_size=8",
        "--config-name train_packed data.dataset_variant=small --max-steps 500 --device cuda",
        "--config my.toml --resume",
    ),
    useful=(
        "run.name",
        "tokenizer.path",
        "data.pipeline_mode",
        "data.megatron_train_prefix",
        "data.dataset_name",
        "model.num_layers",
        "training.max_steps",
        "training.total_batch_size",
        "training.device_batch_size",
        "training.precision",
        "optimizer.learning_rate",
    ),
    flags={"--max-steps": "training.max_steps", "--device": "training.device", "--name": "run.name"},
    add_arguments=_add_arguments,
    adapt=_adapt,
)


if __name__ == "__main__":
    raise SystemExit(main())
