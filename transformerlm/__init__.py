"""Language models from scratch: tokenizer, models, objectives, inference, evaluation.

    from transformerlm import Predictor, load_model, create_model

The names are imported when they are used: `import transformerlm` itself is free, and so are the specs inside.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformerlm.inference.predictor import Predictor as Predictor
    from transformerlm.models.build import create_model as create_model
    from transformerlm.models.files import load_model as load_model
    from transformerlm.models.specs import TransformerSpec as TransformerSpec
    from transformerlm.tokenizer.tokenizer import Tokenizer as Tokenizer

_HOMES = {
    "Predictor": "transformerlm.inference.predictor",
    "Tokenizer": "transformerlm.tokenizer.tokenizer",
    "TransformerSpec": "transformerlm.models.specs",
    "create_model": "transformerlm.models.build",
    "load_model": "transformerlm.models.files",
}
__all__ = ["Predictor", "Tokenizer", "TransformerSpec", "create_model", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
