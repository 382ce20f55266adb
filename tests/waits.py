"""Where the host would wait for a device, counted on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host must know before it goes on."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.name().removeprefix("aten::").split(".")[0]
        boolean_index = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self.WAITING or boolean_index:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
