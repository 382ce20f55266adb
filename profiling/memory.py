"""What the CUDA allocator is doing. On a machine without CUDA every function does nothing and says so."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def start_history(enabled: bool = True, *, max_entries: int = 100_000) -> bool:
    """Record allocations with their stack traces (or stop recording); False when there is no CUDA device."""
    if not torch.cuda.is_available():
        return False
    torch.cuda.memory._record_memory_history(enabled="all" if enabled else None, max_entries=max_entries)
    return True


def dump_snapshot(path: Path | str) -> bool:
    """Write what is allocated now, and the history where recorded; False when there is no CUDA device.

    A name that ends in `.json` gets JSON, any other the pickle that https://pytorch.org/memory_viz draws.
    """
    if not torch.cuda.is_available():
        return False
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(torch.cuda.memory._snapshot(), default=str), encoding="utf-8")
    else:
        torch.cuda.memory._dump_snapshot(str(path))
    return True


def peaks() -> dict[str, int]:
    """Most bytes allocated and reserved since the start or the last reset, over all devices; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    devices = range(torch.cuda.device_count())
    return {
        "allocated": sum(torch.cuda.max_memory_allocated(device) for device in devices),
        "reserved": sum(torch.cuda.max_memory_reserved(device) for device in devices),
    }


def reset_peaks() -> None:
    """Start measuring `peaks` anew."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def summary() -> str:
    """The allocator's own table for the current device, or one line that says there is none."""
    return torch.cuda.memory_summary() if torch.cuda.is_available() else "no CUDA device: no memory statistics"
