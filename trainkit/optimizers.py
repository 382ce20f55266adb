"""Optimizers and their parameter groups, built from specs."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import EXIT_USAGE, UserError
from trainkit.fully_sharded import cut_like, local, whole
from trainkit.muon import Muon
from trainkit.precision import LossScale
from trainkit.specs import AdamWSpec, MuonSpec, OptimizerSpec

ADAM_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""What AdamW keeps of a parameter."""


def build_optimizer(spec: OptimizerSpec, model: nn.Module, own: Container[str] | None = None) -> torch.optim.Optimizer:
    """The optimizer over two groups: matrices decay; vectors and embeddings do not.

    Decaying gains, biases and embedding rows pulls them towards zero for no benefit in generalisation. Each group
    carries its `name`. With `own`, only the parameters of these names.
    """
    decayed, kept = ([p for _, p in part] for part in split_parameters(model))
    excluded = {p for name, p in model.named_parameters() if own is not None and name not in own}
    # One kernel per group instead of several per parameter; it exists on these devices.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    betas = (spec.beta1, spec.beta2)
    match spec:
        case AdamWSpec():
            groups: list[dict[str, Any]] = [{"params": kept, "weight_decay": 0.0, "name": "vectors"}]
            groups += [group | {"weight_decay": spec.weight_decay} for group in _by_width(decayed, spec.base_width)]
            for group in groups:
                # Groups stay where all of their parameters are another rank's: every rank logs the same ones.
                group["params"] = [p for p in group["params"] if p not in excluded]
            return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=betas, eps=spec.eps, fused=fused)
        case MuonSpec():
            return Muon(
                [p for p in decayed if p not in excluded],
                [p for p in kept if p not in excluded],
                lr=spec.learning_rate,
                weight_decay=spec.weight_decay,
                momentum=spec.momentum,
                betas=betas,
                eps=spec.eps,
                fused=fused,
            )


def split_parameters(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """Trainable parameters that decay (matrices) and that do not (vectors, embedding tables), with their names."""
    tables = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    decayed: list[tuple[str, nn.Parameter]] = []
    kept: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim == 2 and name not in tables else kept).append((name, parameter))
    return decayed, kept


def _by_width(matrices: list[nn.Parameter], base_width: int) -> list[dict[str, Any]]:
    """Groups of matrices [out, in] of the same input width; wider ones learn more slowly (muP, arXiv:2203.03466)."""
    if not base_width:
        return [{"params": matrices, "name": "matrices"}]
    groups: dict[int, dict[str, Any]] = {
        width: {"params": [], "name": f"matrices-{width}", "learning_rate_factor": base_width / width}
        for width in sorted({p.shape[1] for p in matrices})
    }
    for matrix in matrices:
        groups[matrix.shape[1]]["params"].append(matrix)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("learning_rate_factor", 1.0)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """For a record: `learning_rate`, that of the groups without a factor, and of each group with one."""
    return {
        f"learning_rate/{group['name']}" if "learning_rate_factor" in group else "learning_rate": group["lr"]
        for group in optimizer.param_groups
    }


def clip_and_update(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, clip: float, scale: LossScale
) -> tuple[Tensor, Tensor]:
    """Update the weights, unless the gradient is not finite; returns its global norm and whether it was skipped (bool).

    The norm is taken once, over all gradients, before they are limited to `clip` (0 = not limited). Nobody waits for
    the device: what depends on its answer happens there.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = scale.unscale(whole(nn.utils.get_total_norm(gradients)))
    skip = norm.isfinite().logical_not()
    if clip or scale.is_enabled:
        factor = (clip / norm).clamp(max=1.0) if clip else torch.ones_like(norm)
        torch._foreach_mul_([local(g) for g in gradients], scale.unscale(factor))  # pyright: ignore[reportPrivateImportUsage]
    _update_unless(skip, optimizer)
    return norm, skip


def _update_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Fused kernels (and Muon) look at `found_inf` themselves, PyTorch's convention for its loss scaler."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
    elif skip.item():
        return
    optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `{"<parameter name>/<state name>": tensor}`; free of group order and world size."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, to the bit: as much of it as this optimizer updates.

    Raises `UserError` for the state of another kind of optimizer.
    """
    parameters = dict(model.named_parameters())
    updated = {p: group.get("state_names", ADAM_STATE) for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, state_name = key.rsplit("/", 1)
        parameter = parameters[name]
        if parameter not in updated:
            continue
        if state_name not in updated[parameter]:
            raise UserError(
                f"the optimizer's state of the checkpoint ({key}) is of another kind of optimizer; set optimizer.kind "
                "as it was, or checkpoint.resume_optimizer = false",
                EXIT_USAGE,
            )
        # Step counters live on the CPU, whatever the device, unless the kernel is fused on CUDA.
        on_device = value.ndim > 0 or optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        held = cut_like(value, parameter if value.ndim else parameter.detach().new_empty(())) if on_device else value
        optimizer.state[parameter][state_name] = held.clone()
