"""Keys and values of the tokens that a model has read, so that the next token costs one position instead of all."""

from __future__ import annotations

import torch
from torch import Tensor

from transformerlm.models.specs import TransformerSpec


class KeyValueCache:
    """Preallocated for `capacity` positions; the model appends to it and moves `length` on.

    `segments` [batch, capacity] exists when the model is called with segments, which then must be in every call.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        *,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (spec.num_layers, batch_size, spec.kv_heads, capacity, spec.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.segments: Tensor | None = None
        self.length = 0
        self.visible = 0
        """Positions that a query sees at least, beyond those up to its own: keys stored there before."""

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [batch, kv_heads, new, head_dim] after `length`; returns all of the layer so far, without a copy."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        seen = max(end, self.visible)
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]

    def append_segments(self, segments: Tensor) -> Tensor:
        """Store int64 [batch, new] after `length`; returns all so far."""
        if self.segments is None:
            assert self.length == 0, "the positions already in the cache came without segments"
            self.segments = segments.new_empty((self.keys.shape[1], self.capacity))
        end = self.length + segments.shape[1]
        self.segments[:, self.length : end] = segments
        return self.segments[:, :end]
