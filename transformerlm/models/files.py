"""The model's part of a checkpoint directory: `model.json`, `model.safetensors`, `ema.safetensors`, `tokenizer/`.

Training writes the directory and seals it with a manifest; whoever loads needs nothing but the directory.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch

from trainkit.artifacts import MANIFEST, verify_directory
from trainkit.errors import UserError
from transformerlm.inference.specs import WeightsName
from transformerlm.models.build import empty_model
from transformerlm.models.specs import (
    AUTOREGRESSIVE,
    Alignment,
    Mode,
    ModelSpec,
    Reading,
    padded_vocabulary,
)
from transformerlm.models.transformer import Transformer
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.dtypes import resolve_device

MODEL_JSON = "model.json"
_WEIGHTS: Mapping[WeightsName, str] = {"raw": "model.safetensors", "ema": "ema.safetensors"}
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be used, and the tokenizer that it was trained with."""

    path: Path
    """The step folder."""
    model: Transformer
    tokenizer: Tokenizer
    reading: Reading


def model_json(spec: ModelSpec, *, vocab_size: int, reading: Reading = AUTOREGRESSIVE) -> dict[str, Any]:
    """What `model.json` says."""
    return {
        "kind": spec.kind,
        "modes": list(reading.modes),
        "alignment": reading.alignment,
        "block_size": reading.block_size,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocabulary(vocab_size),
        "spec": asdict(spec),
    }


def write_model_json(directory: Path, spec: ModelSpec, *, vocab_size: int, reading: Reading = AUTOREGRESSIVE) -> None:
    """Describe the model in a checkpoint directory that is being written."""
    content = json.dumps(model_json(spec, vocab_size=vocab_size, reading=reading), indent=1)
    (directory / MODEL_JSON).write_text(content + "\n", encoding="utf-8")


def read_model_json(directory: Path) -> tuple[ModelSpec, Reading, int]:
    """`(spec, reading, vocab_size)` of a checkpoint directory."""
    path = directory / MODEL_JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, type[ModelSpec]] = {kind.kind: kind for kind in get_args(ModelSpec) or (ModelSpec,)}
        if content["kind"] not in kinds:
            raise ValueError(f"kind {content['kind']!r} is unknown")
        return kinds[content["kind"]](**content["spec"]), _reading(content), int(content["vocab_size"])
    except FileNotFoundError:
        raise UserError(f"{directory} has no {MODEL_JSON}: it is no checkpoint of a language model") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be understood ({error}); use the version that wrote it, or a newer one"
        ) from None


def _reading(content: Mapping[str, Any]) -> Reading:
    for name, value, known in (
        *(("mode", mode, get_args(Mode)) for mode in content["modes"]),
        ("alignment", content["alignment"], get_args(Alignment)),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown")
    return Reading(modes=tuple(content["modes"]), alignment=content["alignment"], block_size=int(content["block_size"]))


def load_model(
    path: Path | str,
    *,
    weights: WeightsName = "raw",
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> Transformer:
    """The model of a checkpoint; see `load_checkpoint`."""
    return load_checkpoint(path, weights=weights, device=device, changes=changes).model


def load_checkpoint(
    path: Path | str,
    *,
    weights: WeightsName = "raw",
    device: torch.device | str = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Model (float32, evaluation mode) and tokenizer of whatever `resolve_checkpoint` accepts, verified.

    `changes` replaces fields of the spec that shape no weight, such as `context_length` with `rope_scaling`.
    Raises `UserError` for a path that is none, a damaged file, or parts that do not fit together.
    """
    directory = resolve_checkpoint(path)
    spec, reading, vocab_size = read_model_json(directory)
    tokenizer = Tokenizer.load(directory / "tokenizer")
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{directory} does not fit together: its tokenizer has {tokenizer.vocab_size} ids, its model {vocab_size}; "
            "use another checkpoint of the run"
        )
    model = empty_model(_changed(spec, changes or {}), vocab_size=vocab_size, device=resolve_device(device))
    _load_weights(model, directory, weights)
    return Checkpoint(directory, model.eval(), tokenizer, reading)


def resolve_checkpoint(path: Path | str) -> Path:
    """The intact step folder that `path` means: itself, or of a run (or its `checkpoints`) the best, else the newest.

    `…/checkpoints/best` and `…/checkpoints/latest` are worked out anew from the folders that are there: the links of
    these names are for people, and may be stale. Of a run, a damaged checkpoint is logged as a warning, and the newest
    intact one takes its place. Raises `UserError` for a path that means none, and for a damaged step folder.
    """
    path = Path(path)
    is_link = path.name in ("best", "latest") and path.parent.name == "checkpoints"
    if not is_link and ((path / MODEL_JSON).is_file() or (path / MANIFEST).is_file()):
        verify_directory(path)
        return path.resolve()
    root = path.parent if is_link else path if path.name == "checkpoints" else path / "checkpoints"
    if not root.is_dir():
        what = "is neither a checkpoint nor a run" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; name a step folder, a run folder, or …/checkpoints/best or latest")
    root = root.resolve()
    newest = next(filter(_is_intact, _newest_first(root)), None)
    if newest is None:
        raise UserError(f"{root} holds no intact checkpoint; let the run save one")
    if is_link and path.name == "latest":
        return newest
    best = _best(newest)
    if best is None and is_link:
        raise UserError(f"{root} holds no best checkpoint; try the run folder")
    return best if best is not None and (best == newest or _is_intact(best)) else newest


def _newest_first(root: Path) -> list[Path]:
    steps = {int(match[1]): path for path in root.iterdir() if (match := _STEP.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _is_intact(step: Path) -> bool:
    try:
        verify_directory(step)
    except UserError as error:
        _log.warning("%s; trying another checkpoint of the run", str(error).removesuffix("; use another copy"))
        return False
    return True


def _best(newest: Path) -> Path | None:
    """The step folder that the newest one remembers as the best, if it is still there."""
    try:
        step = json.loads((newest / "trainer.json").read_text(encoding="utf-8"))["best"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    best = newest.with_name(f"step-{step:08d}")
    return best if best.is_dir() else None


def _changed(spec: ModelSpec, changes: Mapping[str, Any]) -> ModelSpec:
    try:
        return replace(spec, **changes)
    except (TypeError, ValueError) as error:
        raise UserError(f"the model cannot be changed like that: {error}") from None


def _load_weights(model: Transformer, directory: Path, weights: WeightsName) -> None:
    path = directory / _WEIGHTS[weights]
    if not path.exists():
        hint = 'the run kept no average (training.ema_decay); use weights = "raw"' if weights == "ema" else ""
        raise UserError(f"{directory} has no {path.name}: {hint or 'it is no checkpoint of a language model'}")
    stored, own = safetensors.torch.load_file(path, device=str(model.embedding.weight.device)), model.state_dict()
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in own.items()}:
        odd = sorted(name for name in stored.keys() | own.keys() if name not in stored or name not in own)
        odd += sorted(name for name in stored.keys() & own.keys() if stored[name].shape != own[name].shape)
        raise UserError(f"{path} does not fit {MODEL_JSON} (first difference: {odd[0]}); use another checkpoint")
    model.load_state_dict(stored)
