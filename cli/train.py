"""`transformerlm-train`: a model from a tokenizer and token files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cli.common import Command, run_command
from config.loading import Loaded
from config.rendering import to_toml
from config.schemas import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[TrainConfig], arguments: argparse.Namespace) -> int:
    from cli.training import EXIT_CODES, train_from_config

    result = train_from_config(loaded.config, config_toml=to_toml(loaded), resume=arguments.resume)
    return EXIT_CODES[result.status]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run's newest intact checkpoint; without one, start"
    )


COMMAND = Command(
    name="transformerlm-train",
    summary="Train a model on token files. One process, or several under torchrun. Stop it with Ctrl-C and continue "
    "with --resume: not a bit is lost.",
    schema=TrainConfig,
    default_config="train",
    run=run,
    examples=(
        "--config config/resources/train.toml",
        "model.depth=6 training.device_batch_size=8",
        "--config my.toml --max-steps 500 --device cuda",
        "--config my.toml --resume",
    ),
    useful=(
        "run.name",
        "tokenizer.path",
        "data.megatron_train_prefix",
        "model.num_layers",
        "training.max_steps",
        "training.total_batch_size",
        "training.device_batch_size",
        "training.precision",
        "optimizer.learning_rate",
    ),
    flags={"--max-steps": "training.max_steps", "--device": "training.device", "--name": "run.name"},
    add_arguments=_add_arguments,
)


if __name__ == "__main__":
    raise SystemExit(main())
