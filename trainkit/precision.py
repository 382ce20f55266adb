"""What is computed in which type.

Weights, gradients, optimizer state and averages are 32-bit floats, always. `bf16` and `fp16` run the forward and
backward arithmetic that tolerates it (matrix products, attention) in that type through autocast; norms, softmax of the
loss and sums stay in 32 bits. `fp16` has too small a range for gradients, so the loss is scaled up and steps whose
gradient overflows are skipped by the scaler; `bf16` needs none of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

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


class LossScale:
    """Multiplies the loss of `fp16`, so that small gradients do not vanish; a power of two, so that no bit changes.

    A step whose gradient overflows halves it; so many good ones in a row double it. It decides on the device, which
    nobody waits for. In any other precision it is one, for ever.
    """

    _FIRST = 2.0**16
    _STEPS_TO_DOUBLE = 2000

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.is_enabled = precision == "fp16"
        self._value = torch.tensor(self._FIRST if self.is_enabled else 1.0, device=device)
        self._good_steps = torch.zeros((), device=device)

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self._value if self.is_enabled else loss

    def unscale(self, value: Tensor) -> Tensor:
        return value / self._value if self.is_enabled else value

    def blames(self, skip: Tensor) -> Tensor:
        """Whether the scale may be why the step is skipped, bool scalar: it can still become smaller."""
        return skip & (self._value > 1)

    def update(self, skip: Tensor) -> None:
        if self.is_enabled:
            good = torch.where(skip, 0.0, self._good_steps + 1)
            doubles = good >= self._STEPS_TO_DOUBLE
            factor = torch.where(skip, 0.5, torch.where(doubles, 2.0, 1.0))
            self._value = (self._value * factor).clamp(min=1.0)
            self._good_steps = torch.where(doubles, 0.0, good)

    def state_dict(self) -> dict[str, float]:
        """JSON; empty where there is nothing to remember."""
        return {"scale": self._value.item(), "good_steps": self._good_steps.item()} if self.is_enabled else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if self.is_enabled and state:
            self._value.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"])
