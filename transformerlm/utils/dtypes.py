"""Names of precisions and devices, as settings spell them, turned into PyTorch's objects."""

from __future__ import annotations

import torch

from trainkit.errors import EXIT_USAGE, UserError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_dtype(name: str) -> torch.dtype:
    """`fp32` → `torch.float32`, and so on."""
    if name not in DTYPES:
        raise UserError(f"the precision {name!r} is unknown; use one of {', '.join(DTYPES)}", EXIT_USAGE)
    return DTYPES[name]


def resolve_device(name: str | torch.device) -> torch.device:
    """`auto` → CUDA where it exists, else the CPU; any other name must exist on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"the device {name!r} is unknown; use auto, cpu, cuda, cuda:0 or mps", EXIT_USAGE) from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f'there is no device {name!r} on this machine; use device = "auto" or "cpu"', EXIT_USAGE)
    return device
