"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

The momentum of a weight matrix is replaced by the nearest (semi-)orthogonal matrix: every direction that the gradient
sees is followed at the same speed, where Adam would follow a few dominant ones. The nearest orthogonal matrix is U Vᵀ
of the singular value decomposition; a quintic Newton-Schulz iteration gets close enough with matrix products only.

Updates are scaled by 0.2 · √max(rows, columns), which gives each entry the root mean square of a typical AdamW update
(Moonlight, arXiv:2502.16982): one learning rate and one weight decay then serve the matrices and the parameters that
AdamW trains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Chosen by Jordan et al. for the steepest slope at zero: five steps bring singular values into about [0.7, 1.2]."""
_ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon for `matrices` (each of two dimensions), AdamW for `others`; one state, one list of groups."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        matrix_group: dict[str, Any] = {"params": list(matrices), "name": "matrices", "weight_decay": weight_decay}
        matrix_group["state_names"] = frozenset({"momentum"})
        other_group: dict[str, Any] = {"params": list(others), "name": "vectors", "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW([other_group], lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([matrix_group, other_group], {"lr": lr, "momentum": momentum, "fused": fused})
        # The group is one dictionary in both optimizers; so is the state from here on.
        self.adamw.state = self.state
        # PyTorch's convention: who sets `found_inf` (1 = change nothing) before a step need not wait for the device.
        self._step_supports_amp_scaling = fused
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        group = self.param_groups[0]
        for parameters in _by_shape(group["params"]):
            self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])
        if self._step_supports_amp_scaling:
            self.adamw.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()

    def _update(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """Matrices of one shape, stacked, so that each product is one kernel."""
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        buffers = [self._buffer(p) for p in parameters]
        # A momentum that moves towards itself stays, to the bit; and weights that move by zero.
        skip = self.found_inf.to(gradients.device, gradients.dtype)
        gradients = torch.where(skip > 0, torch.stack(buffers), gradients)
        rate = lr * (1 - skip)
        torch._foreach_lerp_(buffers, list(gradients.unbind()), 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        # Nesterov: look one step ahead along the new momentum.
        directions = orthogonalize(gradients.lerp(torch.stack(buffers), momentum))
        scale = _ADAMW_RMS * max(gradients.shape[1:]) ** 0.5
        for parameter, direction in zip(parameters, directions.unbind(), strict=True):
            parameter.mul_(1 - rate * weight_decay).sub_(direction * (rate * scale))

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix [n, rows, columns]; bfloat16 inside on CUDA, where it is exact enough and fast."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x  # the products below are of the shorter side's size
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def _by_shape(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.shape].append(parameter)
    return groups.values()
