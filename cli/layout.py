"""One root for all that the pipeline reads and makes, and what its flags `--mode`, `--input`, `--run-dir` … stand for.

    ROOT/datasets/{train,val}/EXPERIMENT    text, such as the shards of scripts/shard_dataset.py
    ROOT/artifacts/tokenizer/EXPERIMENT     the tokenizer of that text, for all runs on it
    ROOT/artifacts/tokens/EXPERIMENT        its token files, likewise
    ROOT/artifacts/RUN/train.toml           the configuration that transformerlm-train runs
    ROOT/runs/RUN                           the run
    ROOT/hf_cache                           what was read from the Hugging Face hub

The flags become layers of settings (`config.layers`), over the file and below what is typed; `--print-config` shows
them.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from config.layers import Tree, file_layers, leaves, merge, override_layer, plain, with_origin
from config.loading import shipped_names
from config.schemas import PipelineConfig
from trainkit.data.documents import SUFFIXES
from trainkit.errors import EXIT_USAGE, UserError

CLOUD_ROOT = "/workspace"
ROOT_VARIABLE = "CLOUD_ROOT"

HELD_OUT = {"validation_fraction": 0.05}
"""Of text without a validation set beside it, where the configuration says nothing."""
PLAIN_TEXT = {"max_document_characters": 2000}
"""A `.txt` file without separators is one document, of which no share can be held out."""

LAYOUT = ("input", "experiment", "run_dir", "root", "mode")
"""Flags any of which asks for one root."""
STANDS_FOR: Mapping[str, tuple[str, ...]] = {
    "input": ("corpus.kind", "corpus.train_paths"),
    "run_dir": ("run.dir", "run.name"),
    "tokenizer_json": ("tokenizer.path", "force_retrain_tokenizer"),
}
"""Flags, and what cannot be given beside each: other flags, and settings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", metavar="NAME", help="same as --config-name; a FILE.toml is one of your own")
    add("--mode", choices=("local", "cloud"), help="what --root is unless given: this folder, or the cloud's volume")
    add(
        "--root",
        metavar="DIR",
        help=f"folder of datasets, artifacts and runs; in the cloud ${ROOT_VARIABLE}, or {CLOUD_ROOT}",
    )
    add("--input", metavar="PATH", help="train on this file or folder of text, or on checked shards")
    add("--experiment", metavar="NAME", help="runs of one name share tokenizer and token files; see docs/cloud.md")
    add("--run-dir", metavar="DIR", help="folder of the run, such as runs/local-smoke; below --root if relative")
    add("--tokenizer-json", metavar="FILE", help="use this tokenizer, a tokenizer.json of Hugging Face or a folder")
    add("--force-retrain-tokenizer", action="store_true", help="train a tokenizer that exists again")


# -- flags to settings -------------------------------------------------------------------------------------------------


def choose_profile(arguments: argparse.Namespace) -> None:
    """`--profile` as `--config` or `--config-name`."""
    name = arguments.profile
    if name is None:
        return
    if arguments.config is not None or arguments.config_name is not None:
        raise UserError("give either --profile or --config, not both", EXIT_USAGE)
    if "/" in name or name.endswith(".toml"):
        arguments.config = name
    elif name in shipped_names():
        arguments.config_name = name
    else:
        near = difflib.get_close_matches(name.replace("-", "_"), shipped_names(), n=1)
        guess = f"did you mean `{near[0]}`?" if near else f"the names are {', '.join(shipped_names())}"
        raise UserError(f"there is no profile {name!r}; {guess}", EXIT_USAGE)


def settings_of_flags(arguments: argparse.Namespace, file: Path) -> list[Tree]:
    """The layers that the flags stand for, over the configuration `file`."""
    typed = override_layer(arguments.assignments)
    names = {".".join(path) for path, _ in leaves(typed)}
    for flag in STANDS_FOR:
        _refuse_both(arguments, flag, names)
    below = _settings(file)
    layers: list[Tree] = []
    if _is_laid_out(arguments):
        run = Path(arguments.run_dir).name if arguments.run_dir else _run_name(merge(below, typed), file)
        layers += _places(arguments, run)
    if arguments.input:
        layers.append(
            with_origin({"corpus": _corpus(Path(arguments.input), _table(below, "corpus"), names)}, "--input")
        )
    if arguments.tokenizer_json:
        layers.append(with_origin({"tokenizer": {"path": arguments.tokenizer_json}}, "--tokenizer-json"))
    return layers


def _refuse_both(arguments: argparse.Namespace, flag: str, typed: Collection[str]) -> None:
    if not getattr(arguments, flag):
        return
    for other in STANDS_FOR[flag]:
        if other in typed or getattr(arguments, other, None):
            words = f"{other}=…" if "." in other else f"--{other.replace('_', '-')}"
            raise UserError(f"give either --{flag.replace('_', '-')} or {words}, not both", EXIT_USAGE)


def _is_laid_out(arguments: argparse.Namespace) -> bool:
    """Whether the layout decides where artifacts go, and not the configuration alone."""
    return any(getattr(arguments, name) for name in LAYOUT)


def root_of(arguments: argparse.Namespace) -> Path:
    if arguments.root:
        return Path(arguments.root)
    return Path(os.environ.get(ROOT_VARIABLE) or CLOUD_ROOT) if arguments.mode == "cloud" else Path()


def _places(arguments: argparse.Namespace, run: str) -> list[Tree]:
    """Where everything goes."""
    root = root_of(arguments)
    directory = root / (arguments.run_dir or f"runs/{run}")
    if directory.name in ("", ".."):
        raise UserError(f"--run-dir {arguments.run_dir} has no name; name a folder such as runs/smoke", EXIT_USAGE)
    layers: list[Tree] = []
    if arguments.run_dir:
        layers.append(with_origin({"run": {"dir": str(directory.parent), "name": directory.name}}, "--run-dir"))
    elif root != Path():  # else a configuration may have a folder of its own for its runs
        layers.append(with_origin({"run": {"dir": str(directory.parent)}}, _first(arguments, "root", "mode")))
    artifacts = {"dir": str(root / "artifacts" / run)}
    if experiment := _experiment(arguments, run):
        artifacts |= {f"{what}_dir": str(root / "artifacts" / what / experiment) for what in ("tokenizer", "tokens")}
    layers.append(with_origin({"artifacts": artifacts}, _first(arguments, *LAYOUT)))
    return layers


def _first(arguments: argparse.Namespace, *names: str) -> str:
    """The first of these flags that is given."""
    return next(f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name))


def _experiment(arguments: argparse.Namespace, run: str) -> str:
    """The name that runs share tokenizer and token files under: the one that shards have, else each run its own."""
    if arguments.experiment or not arguments.input:
        name = arguments.experiment or ""
        if "/" in name or name.startswith("."):
            raise UserError(f"--experiment {name} is no name for a folder: no slash, no dot in front", EXIT_USAGE)
        return name
    text = Path(arguments.input).absolute()
    if text.parent.name != "train":
        return run
    return next((text.name.removesuffix(ending) for ending in SUFFIXES if text.name.endswith(ending)), text.name)


def _settings(file: Path) -> Tree:
    tree: Tree = {}
    for layer in file_layers(file):
        tree = merge(tree, layer)
    return tree


def _run_name(settings: Tree, file: Path) -> str:
    return str(_table(settings, "run").get("name", file.stem))


def _table(settings: Tree, name: str) -> dict[str, Any]:
    """The values of a table; where a file has something else in its place, validation will say so."""
    table = settings.get(name)
    return plain(table) if isinstance(table, dict) else {}


def _corpus(text: Path, below: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The text, and what it is validated on: what lies beside it as the sharder would put it there, else a share."""
    known = below if below.get("kind") == "files" else {}
    defaults = {**HELD_OUT, **(PLAIN_TEXT if text.name.endswith((".txt", ".txt.gz")) else {})}
    place = text if text.parent.name == "train" else text.absolute()
    beside = place.parent.parent / "val" / place.name
    is_divided = place.parent.name == "train" and beside.exists()
    return {
        "kind": "files",
        "train_paths": [str(text)],
        "val_paths": [str(beside)] if is_divided and "corpus.validation_fraction" not in typed else [],
        **{name: value for name, value in defaults.items() if name not in known},
    }


# -- before the first stage --------------------------------------------------------------------------------------------


def prepare(config: PipelineConfig, arguments: argparse.Namespace) -> None:
    """Refuse places that cannot be written and text that is not whole, before anything is made."""
    root = root_of(arguments)
    if arguments.mode == "cloud":
        if not root.is_dir():
            raise UserError(
                f"there is no folder {root}, the root of --mode cloud: mount the volume there, or name another by "
                f"--root or {ROOT_VARIABLE}"
            )
        os.environ.setdefault("HF_HOME", str(root / "hf_cache"))
    places = {
        "run.dir": Path(config.run.dir) / config.run.name,
        "artifacts.dir": Path(config.artifacts.dir),
        "artifacts.tokenizer_dir": Path(config.artifacts.tokenizer_dir or config.artifacts.dir),
        "artifacts.tokens_dir": Path(config.artifacts.tokens_dir or config.artifacts.dir),
    }
    for setting, place in places.items():
        check_writable(place, "--root" if _is_laid_out(arguments) else setting)
    if arguments.input:
        _check_single(Path(arguments.input))


def check_writable(directory: Path, setting: str) -> None:
    """Find out before the first stage, not after the second, that a result has no place."""
    place = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{directory} cannot be written, because of {place}; choose another {setting}")


def _check_single(text: Path) -> None:
    """A folder above both splits would train on what it is validated with."""
    if all((text / split).is_dir() for split in ("train", "val")):
        raise UserError(f"{text} holds train and val; name what to train on, such as --input {text}/train/NAME")
