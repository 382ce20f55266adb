"""Named ranges on a timeline, in the real modules, free when off.

    TRANSFORMERLM_NVTX=1 TRANSFORMERLM_NVTX_LEVEL=fine nsys profile -o result transformerlm-train …

shows them in NVIDIA Nsight Systems (the `nvtx` package, domain `transformerlm`); inside `traced` they show in PyTorch's
profiler. Each level has the ranges of the one before:

| level | range | what happens inside |
|---|---|---|
| `coarse` | `trial` | before the first step: a micro-batch forward and backward, to see what fits and what it costs |
| | `data` | the loop waits for the batches of the next step |
| | `step` | all of one optimizer step: `transfer`, `forward`, `backward` and `optimizer` lie in it |
| | `transfer` | batches go to the device (nothing to do on a CPU) |
| | `forward`, `backward` | of one micro-batch |
| | `reduce` | ranks add numbers: the terms' denominators, gradients; only with several ranks |
| | `optimizer` | norm, clipping, update, averaged weights |
| | `evaluate`, `sample` | a validation; the texts that a run writes |
| | `save` | the state is collected and copied for a checkpoint |
| | `write` | the checkpoint is written, on the thread `checkpoints` |
| | `prefill`, `decode` | the pass over a prompt and its first new token; every later token |
| | `denoise` | one pass of a diffusion model, and what is drawn from it |
| | `score` | a batch whose likelihood is measured |
| `fine` | `attention`, `feed_forward`, `head` | the parts of the model; the first two with their norms |
| | `draw` | in `prefill`, `decode` and `denoise`: from logits to tokens |
| `verbose` | `layer` | a layer: its `attention` and `feed_forward` lie in it |
| | `mixing` | in `attention`: where queries meet keys and values |

Compiled code has no ranges inside: `torch.compile` leaves out what `range` would mark, so that its graph stays whole,
and `layer`, `attention`, `mixing`, `feed_forward` and `head` vanish from a compiled forward pass. A range is what the
host did; kernels run when the device gets to them, and the profilers connect the two.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.compiler import is_dynamo_compiling

from profiling.specs import Level

DOMAIN = "transformerlm"

_RANK: dict[str, int] = {"coarse": 1, "fine": 2, "verbose": 3}
_NOTHING: AbstractContextManager[object] = nullcontext()


def _rank_of_environment() -> int:
    """How many levels NVTX shows; 0 = off. Read once at import: a run does not change its mind."""
    if os.environ.get("TRANSFORMERLM_NVTX", "0") in ("", "0"):
        return 0
    level = os.environ.get("TRANSFORMERLM_NVTX_LEVEL", "coarse")
    if level not in _RANK:
        raise SystemExit(f"TRANSFORMERLM_NVTX_LEVEL is {level!r}; use one of {', '.join(_RANK)}")
    return _RANK[level]


_nvtx = _rank_of_environment()
_torch = 0
_enabled = _nvtx


def range(name: str, level: Level = "coarse") -> AbstractContextManager[object]:
    """A context manager that marks its block as `name`, when ranges of `level` are on; else one shared null object."""
    # In this order: a graph that `torch.compile` traces then depends on nothing here, and serves whatever is on.
    if is_dynamo_compiling() or _RANK[level] > _enabled:
        return _NOTHING
    if _RANK[level] > _torch:
        return _nvtx_range(name)
    return _torch_range(name) if _RANK[level] > _nvtx else _both(name)


@contextmanager
def traced(level: Level) -> Generator[None]:
    """Inside, ranges up to `level` are also events of `torch.profiler`, on all threads that it watches."""
    global _torch, _enabled
    before, _torch = _torch, _RANK[level]
    _enabled = max(_nvtx, _torch)
    try:
        yield
    finally:
        _torch = before
        _enabled = max(_nvtx, _torch)


def _nvtx_range(name: str) -> AbstractContextManager[object]:
    import nvtx

    return nvtx.annotate(name, domain=DOMAIN)


def _torch_range(name: str) -> AbstractContextManager[object]:
    from torch.profiler import record_function

    return record_function(name)


@contextmanager
def _both(name: str) -> Generator[None]:
    with _nvtx_range(name), _torch_range(name):
        yield
