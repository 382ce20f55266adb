"""Named ranges on the timeline of NVIDIA Nsight Systems, in the real modules, free when off.

    TRANSFORMERLM_NVTX=1 TRANSFORMERLM_NVTX_LEVEL=fine nsys profile -o result transformerlm-train …

Each level has the ranges of the one before:

- `coarse`: the phases of training (data, forward, backward, optimizer, evaluate, save), of generation (prefill, decode)
  and of scoring (score);
- `fine`: the parts of a model (attention, feed_forward, head);
- `verbose`: inside attention, where values meet (mixing).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

Level = Literal["coarse", "fine", "verbose"]

_RANK: dict[str, int] = {"coarse": 1, "fine": 2, "verbose": 3}
_NOTHING: AbstractContextManager[object] = nullcontext()


def _enabled_rank() -> int:
    """How many levels are on; 0 = off. Read once at import: a run does not change its mind."""
    if os.environ.get("TRANSFORMERLM_NVTX", "0") in ("", "0"):
        return 0
    level = os.environ.get("TRANSFORMERLM_NVTX_LEVEL", "coarse")
    if level not in _RANK:
        raise SystemExit(f"TRANSFORMERLM_NVTX_LEVEL is {level!r}; use one of {', '.join(_RANK)}")
    return _RANK[level]


_enabled = _enabled_rank()


def range(name: str, level: Level = "coarse") -> AbstractContextManager[object]:
    """A context manager that marks its block as `name`, when ranges of `level` are on; else one shared null object.

    Inside a graph that `torch.compile` is tracing there is nothing to mark, and the call must not break the graph.
    """
    if _RANK[level] > _enabled:
        return _NOTHING
    import torch

    if torch.compiler.is_compiling():
        return _NOTHING
    import nvtx

    return nvtx.annotate(name, domain="transformerlm")
