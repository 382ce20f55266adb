"""How large gradients, weights, updates and activations are, in each layer and in all.

A `LayerNorms` looks at one step, now and then (`logging.norms_every`); no other step pays for it. A layer is what
stands before the rest of a parameter's name: `blocks.3` of `blocks.3.attention.query.weight`, `embedding` of
`embedding.weight`. Sums are taken on the device and read together, once.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.distribution import World, all_ranks, widest_float
from trainkit.fully_sharded import local
from trainkit.precision import LossScale
from trainkit.tree import tree_sum


class Probe:
    """Told how a step goes on; this one does not look."""

    def forward(self) -> AbstractContextManager[None]:
        """Around all forward and backward passes of the step."""
        return nullcontext()

    def before_update(self, scale: LossScale) -> None:
        """`.grad` holds the step's whole gradient, not yet clipped, times the loss scale."""

    def after_update(self) -> None:
        """The weights are the new ones, on all ranks."""


class LayerNorms(Probe):
    """Measures one step of `model`. It holds one copy of the weights during the update, when activations are gone."""

    def __init__(self, model: nn.Module, world: World, *, activations: bool = False) -> None:
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._layers = [layer_of(name) for name, _ in parameters]
        self._parameters = [p for _, p in parameters]
        self._world = world
        self._squares: dict[str, Tensor] = {}
        self._before: list[Tensor] = []
        modules = dict(model.named_modules())
        names = dict.fromkeys(self._layers)
        self._watched = {name: modules[name] for name in names if name in modules} if activations else {}
        self._outputs = {name: torch.zeros(2, dtype=torch.float64) for name in self._watched}

    @contextmanager
    def forward(self) -> Generator[None]:
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: self._see_output(name, output))
            for name, module in self._watched.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def before_update(self, scale: LossScale) -> None:
        gradients = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in self._parameters]
        self._squares["gradient_norm"] = scale.unscale(_norms(gradients)).square()
        self._before = [local(p).detach().clone() for p in self._parameters]

    def after_update(self) -> None:
        weights = [local(p).detach() for p in self._parameters]
        self._squares["weight_norm"] = _norms(weights).square()
        torch._foreach_sub_(self._before, weights)  # pyright: ignore[reportPrivateImportUsage]
        self._squares["update_ratio"] = _norms(self._before).square()
        self._before.clear()

    def read(self) -> dict[str, float]:
        """For a record, on all ranks, which all must call it; waits for the device.

        `gradient_norm` before clipping, `weight_norm` after the update, `update_ratio` = |update| / |weights|; each
        over all weights and, with `/<layer>` appended, over those of a layer. `activation_rms/<layer>`: root of the
        mean square of what the layer gives.
        """
        gradients, weights, updates = (_by_layer(self._layers, values) for values in self._sums().tolist())
        values: dict[str, float] = {}
        for name, squares in (("gradient_norm", gradients), ("weight_norm", weights)):
            values |= {name + layer: math.sqrt(square) for layer, square in squares.items()}
        values |= {
            f"update_ratio{layer}": math.sqrt(square / weights[layer])
            for layer, square in updates.items()
            if weights[layer]
        }
        return values | self._activations()

    def _sums(self) -> Tensor:
        """Squares [3, parameters] over all ranks."""
        squares = torch.stack([self._squares[name] for name in ("gradient_norm", "weight_norm", "update_ratio")])
        is_cut = any(local(p) is not p for p in self._parameters)
        return tree_sum(all_ranks(squares, self._world)) if is_cut else squares

    def _see_output(self, name: str, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
        if tensor is not None and tensor.is_floating_point():
            square = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).square()
            self._outputs[name] = self._outputs[name].to(square.device) + torch.stack(
                [square, torch.full_like(square, tensor.numel())]
            )

    def _activations(self) -> dict[str, float]:
        if not self._outputs:
            return {}
        device = self._world.device
        sums = torch.stack([pair.to(device, widest_float(device)) for pair in self._outputs.values()])
        pairs = tree_sum(all_ranks(sums, self._world)).tolist()
        return {
            f"activation_rms/{name}": math.sqrt(square / count)
            for name, (square, count) in zip(self._outputs, pairs, strict=True)
            if count
        }


def layer_of(name: str) -> str:
    """The part of a parameter's name that says which layer it belongs to: up to its first number, else the first word.

    A parameter of the model itself is a layer of its own.
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def _norms(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of each, [tensors], in the widest float."""
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).to(widest_float(norms[0].device))


def _by_layer(layers: Iterable[str], squares: Iterable[float]) -> Mapping[str, float]:
    """Sums under `/<layer>`, and over all under the empty name, first."""
    sums: dict[str, float] = {}
    for layer, square in chain.from_iterable(
        (("", s), (f"/{layer}", s)) for layer, s in zip(layers, squares, strict=True)
    ):
        sums[layer] = sums.get(layer, 0.0) + square
    return sums
