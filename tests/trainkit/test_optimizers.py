from __future__ import annotations

import pytest
import torch
from torch import nn

from trainkit.averaging import averaged_weights, start_average, update_average
from trainkit.errors import UserError
from trainkit.muon import orthogonalize
from trainkit.optimizers import (
    build_optimizer,
    learning_rates,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    split_parameters,
)
from trainkit.precision import LossScale
from trainkit.specs import AdamWSpec, MuonSpec, OptimizerSpec


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.table(ids)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        ids = torch.tensor([step % 5, 1, 2])
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_matrices_decay() -> None:
    decayed, kept = split_parameters(Small())
    assert {name for name, _ in decayed} == {"linear.weight"}
    assert {name for name, _ in kept} == {"table.weight", "norm.weight", "norm.bias", "linear.bias"}


def test_update_follows_the_paper() -> None:
    """Two AdamW updates against the formulas of arXiv:1711.05101, algorithm 2, written out."""
    model = nn.Linear(3, 2, bias=False).double()
    spec = AdamWSpec(learning_rate=0.01, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(spec, model)
    wanted, m, v = model.weight.detach().clone(), 0.0, 0.0
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    for t in (1, 2):
        model(x).square().sum().backward()
        g = model.weight.grad.clone()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        wanted = wanted - 0.01 * (update + 0.5 * wanted)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_orthogonalize_comes_near_the_polar_factor() -> None:
    """Against the singular value decomposition: same singular vectors, singular values near one."""
    torch.manual_seed(0)
    for shape in [(3, 8, 8), (2, 5, 20), (2, 20, 5)]:
        matrices = torch.randn(shape, dtype=torch.float64)
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        found = u.mT @ orthogonalize(matrices) @ vt.mT  # diagonal, where the singular vectors are the same
        values = torch.diagonal(found, dim1=1, dim2=2)
        torch.testing.assert_close(found, torch.diag_embed(values), atol=1e-9, rtol=0)
        assert float(values.min()) > 0.4 and float(values.max()) < 1.3


def test_muon_steps_matrices_by_its_formula_and_the_rest_by_adamw() -> None:
    spec = MuonSpec(learning_rate=0.01, weight_decay=0.5, momentum=0.9)
    model, twin = Small(), Small()
    optimizer = build_optimizer(spec, model)
    adamw = build_optimizer(AdamWSpec(learning_rate=0.01, weight_decay=0.5), twin)
    for m in (model, twin):
        m(torch.tensor([0, 1, 2])).square().sum().backward()
    weight, gradient = model.linear.weight.detach().clone(), model.linear.weight.grad.clone()
    optimizer.step()
    adamw.step()
    direction = orthogonalize((gradient.lerp(0.1 * gradient, 0.9))[None])[0]
    wanted = weight * (1 - 0.01 * 0.5) - 0.01 * 0.2 * 2.0 * direction
    torch.testing.assert_close(model.linear.weight.detach(), wanted)
    for name, parameter in twin.named_parameters():
        if name != "linear.weight":
            assert torch.equal(parameter, dict(model.named_parameters())[name])
    set_learning_rate(optimizer, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("spec", [AdamWSpec(), MuonSpec()])
def test_state_by_name_continues_to_the_bit(spec: OptimizerSpec) -> None:
    straight = Small()
    optimizer = build_optimizer(spec, straight)
    train(straight, optimizer, 3)
    saved = {name: t.clone() for name, t in optimizer_tensors(optimizer, straight).items()}
    weights = {name: t.clone() for name, t in straight.state_dict().items()}
    assert "linear.bias/exp_avg" in saved
    train(straight, optimizer, 4)

    resumed = Small()
    resumed.load_state_dict(weights)
    again = build_optimizer(spec, resumed)
    load_optimizer_tensors(again, resumed, saved)
    train(resumed, again, 4)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


@pytest.mark.parametrize(("before", "now"), [(AdamWSpec(), MuonSpec()), (MuonSpec(), AdamWSpec())])
def test_the_state_of_another_kind_of_optimizer_is_refused(before: OptimizerSpec, now: OptimizerSpec) -> None:
    model = Small()
    optimizer = build_optimizer(before, model)
    train(model, optimizer, 1)
    with pytest.raises(UserError, match=r"another kind of optimizer; .* checkpoint\.resume_optimizer = false"):
        load_optimizer_tensors(build_optimizer(now, model), model, optimizer_tensors(optimizer, model))


def test_average_is_the_recursion_and_swaps_back_to_the_bit() -> None:
    model = Small()
    average = start_average(model)
    by_hand = {name: t.clone() for name, t in average.items()}
    optimizer = build_optimizer(AdamWSpec(learning_rate=0.1), model)
    for step in range(1, 30):
        train(model, optimizer, 1)
        update_average(average, model, 0.7, step, torch.tensor(False))
        decay = min(0.7, (1 + step) / (10 + step))
        by_hand = {n: decay * by_hand[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with averaged_weights(model, average):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), by_hand[name])
            assert not torch.equal(parameter, before[name])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_wider_matrices_learn_more_slowly() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = build_optimizer(AdamWSpec(base_width=8), model)
    set_learning_rate(optimizer, 0.4)
    wanted = {"learning_rate": 0.4} | {f"learning_rate/matrices-{w}": 0.4 * 8 / w for w in (4, 8, 16)}
    assert learning_rates(optimizer) == pytest.approx(wanted)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    plain = build_optimizer(AdamWSpec(), model)
    set_learning_rate(plain, 0.4)
    assert learning_rates(plain) == {"learning_rate": 0.4}
    assert len([p for group in plain.param_groups for p in group["params"]]) == 6


def test_the_loss_scale_is_blamed_until_it_can_shrink_no_more() -> None:
    """What the scale may have caused is not held against the data; but not for ever."""
    scale = LossScale("fp16", torch.device("cpu"))
    bad, good = torch.tensor(True), torch.tensor(False)
    blamed = 0
    while bool(scale.blames(bad)):
        scale.update(bad)
        blamed += 1
    assert blamed == 16 and float(scale.scale(torch.tensor(3.0))) == 3.0
    assert not scale.blames(good)
    for _ in range(2000):
        scale.update(good)
    assert float(scale.scale(torch.tensor(3.0))) == 6.0 and float(scale.unscale(torch.tensor(6.0))) == 3.0
    resumed = LossScale("fp16", torch.device("cpu"))
    resumed.load_state_dict(scale.state_dict())
    assert resumed.state_dict() == scale.state_dict()
    for precision in ("bf16", "fp32"):
        assert not LossScale(precision, torch.device("cpu")).blames(bad)
