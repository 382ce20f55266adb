"""What is computed in which type.

Weights, gradients, optimizer state and averages are 32-bit floats, always. `bf16` and `fp16` run the forward and
backward arithmetic that tolerates it (matrix products, attention) in that type through autocast; norms, softmax of the
loss and sums stay in 32 bits. `fp16` has too small a range for gradients, so the loss is scaled up and steps whose
gradient overflows are skipped by the scaler; `bf16` needs none of that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from trainkit.specs import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on this device; any other name is itself."""
    if precision != "auto":
        return precision
    match device.type:
        case "cuda":
            is_native = torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            # Without these instructions 16-bit products are emulated: slower than 32-bit ones.
            is_native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        case _:
            is_native = False
    return "bf16" if is_native else "fp32"


def autocast_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    match resolve_precision(precision, device):
        case "fp32":
            return nullcontext()
        case "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, torch.float16)


def build_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """A loss scaler; it does nothing unless the precision is `fp16`."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
