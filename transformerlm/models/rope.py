"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864); `docs/rope.md` explains the knobs.

Channel i of the first half of a head and channel i of its second half form a pair, which is turned by
position · frequency_i. A product of a query and a key then depends on the distance of their positions only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformerlm.models.specs import TransformerSpec


def rope_frequencies(spec: TransformerSpec) -> Tensor:
    """Radians per position of each channel pair, float64 [head_dim / 2] on the CPU; scaling included."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float64, device="cpu") / spec.head_dim
    match spec.rope_scaling:
        case "none":
            return spec.rope_theta**-exponent
        case "linear":
            return spec.rope_theta**-exponent / spec.rope_scaling_factor
        case "ntk":
            # The base grows so that the slowest pair turns `factor` times slower, while the fastest keeps its pace.
            grown = spec.rope_scaling_factor ** (spec.head_dim / max(spec.head_dim - 2, 1))
            return (spec.rope_theta * grown) ** -exponent


def rope_table(spec: TransformerSpec) -> Tensor:
    """Cosines, and sines with the sign that `rotate` needs: float64 [2, context_length, 1, head_dim] on the CPU."""
    angles = torch.outer(torch.arange(spec.context_length, dtype=torch.float64, device="cpu"), rope_frequencies(spec))
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]).unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` [batch, length, heads, head_dim] by tables that broadcast to it; computed in the tables' type."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class Rope(nn.Module):
    """The tables of a model, built once and kept in at least 32 bits: rounded, they would turn by wrong angles.

    The table is no buffer: DDP need not broadcast it, checkpoints need not hold it, and `.to(torch.bfloat16)` must
    not round it. It follows the module to another device or type by being built anew there.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.table = rope_table(spec).to(torch.get_default_device(), torch.float32)

    def forward(self, start: int, length: int, positions: Tensor | None) -> Tensor:
        """Cosines and sines of `positions` (int64 [length] or [batch, length]), else of start … start + length - 1."""
        return self.table[:, start : start + length] if positions is None else self.table[:, positions]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        super()._apply(fn, recurse)
        target = fn(self.table[:0])
        self.table = rope_table(self.spec).to(target.device, torch.promote_types(target.dtype, torch.float32))
        return self
