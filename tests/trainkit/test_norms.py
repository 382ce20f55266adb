"""Norms of layers agree with what one computes by hand, for any strategy; no other step pays for them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainkit.ranks import alone, run_on_ranks
from tests.trainkit.test_loop import ListLog, make_run
from tests.trainkit.toys import TOYS, Regression, ToySource
from tests.waits import Waits
from trainkit.distribution import World
from trainkit.errors import UserError
from trainkit.loop import train
from trainkit.meter import SmoothedLoss
from trainkit.norms import layer_of
from trainkit.specs import DistributedSpec, LoggingSpec
from trainkit.step import accumulate_gradients
from trainkit.task import Batch, Loss, Task
from trainkit.throughput import peak_flops


def norms_of(log: ListLog) -> list[dict[str, Any]]:
    return [
        {name: float.fromhex(value) if str(value).startswith("0x") else value for name, value in record.items()}
        for record in log.records
        if record["kind"] == "norms"
    ]


def test_a_layer_is_what_stands_before_the_rest_of_a_name() -> None:
    names = ["blocks.3.attention.query.weight", "a.blocks.12.x.0.bias", "embedding.weight", "0.weight", "scale", "w.0"]
    assert [layer_of(n) for n in names] == ["blocks.3", "a.blocks.12", "embedding", "0", "scale", "w"]


def test_they_are_those_of_autograd(tmp_path: Path) -> None:
    """One step by hand: gradients before clipping, weights after the update, the update between."""
    build, task = TOYS["language"]
    by_hand, log = build(), ListLog()
    model = build()
    before = copy.deepcopy(model.state_dict())
    spec = LoggingSpec(norms_every=1, activation_norms=True)
    training = {"max_steps": 1, "gradient_clip": 1e-3}
    train(make_run(tmp_path, log, model=model, logging=spec, training=training))
    batches, _ = next(ToySource(alone()).steps(None))
    replica: Any = type("Replica", (), {"forward": by_hand, "module": by_hand, "reducer": Plain(by_hand)})()
    accumulate_gradients(replica, task, batches, alone())

    (values,) = norms_of(log)

    def norm(tensors: Mapping[str, torch.Tensor], layer: str) -> float:
        part = [t.double().square().sum() for name, t in tensors.items() if layer in ("", layer_of(name))]
        return math.sqrt(float(sum(part)))

    gradients = {name: p.grad for name, p in by_hand.named_parameters() if p.grad is not None}
    after = {name: p.detach() for name, p in model.named_parameters()}
    updates = {name: after[name] - before[name] for name in after}
    for layer in ("", "embedding", "mixer", "head"):
        suffix = f"/{layer}" if layer else ""
        assert values[f"gradient_norm{suffix}"] == pytest.approx(norm(gradients, layer), rel=1e-5)
        assert values[f"weight_norm{suffix}"] == pytest.approx(norm(after, layer), rel=1e-5)
        ratio = norm(updates, layer) / norm(after, layer)
        assert values[f"update_ratio{suffix}"] == pytest.approx(ratio, rel=1e-3)
    tokens = torch.cat([batch["tokens"][:, :-1] for batch in batches])
    embedded = nn.functional.embedding(tokens, before["embedding.weight"])
    assert values["activation_rms/embedding"] == pytest.approx(float(embedded.square().mean().sqrt()), rel=1e-5)
    assert not model.get_submodule("embedding")._forward_hooks


class Plain:
    """Autograd adds; nobody else."""

    def __init__(self, model: nn.Module) -> None:
        model.zero_grad()

    def leaf(self, index: int, count: int) -> Any:
        del index, count
        return torch.enable_grad()

    def finish(self) -> None:
        pass


def test_measuring_changes_nothing_and_comes_when_it_is_due(tmp_path: Path) -> None:
    logs: list[ListLog] = []
    for every in (0, 7):
        logs.append(ListLog())
        spec = LoggingSpec(norms_every=every, activation_norms=True)
        train(make_run(tmp_path / str(every), logs[-1], logging=spec))
    assert [r["step"] for r in norms_of(logs[1])] == [7, 14, 21, 28] and not norms_of(logs[0])
    assert logs[0].records == [r for r in logs[1].records if r["kind"] != "norms"]


def norms_on_ranks(world: World, folder: Path, strategy: Any) -> list[dict[str, Any]]:
    log = ListLog()
    spec = LoggingSpec(norms_every=10, activation_norms=True)
    distributed = DistributedSpec(strategy=strategy)
    source = ToySource(world, micro=3)  # rows that fill a micro-batch would count as activations
    train(make_run(folder, log, world=world, logging=spec, distributed=distributed, source=source, toy="mlp"))
    return norms_of(log)


@pytest.mark.parametrize("strategy", ["zero1", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_shares_of_weights_add_up(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "ranks").mkdir()
    ranks = run_on_ranks(2, norms_on_ranks, tmp_path / "ranks", tmp_path / "two", strategy)
    one = norms_on_ranks(alone(), tmp_path / "one", "replicate")
    assert ranks[0] == ranks[1]
    for mine, theirs in zip(one, ranks[0], strict=True):
        assert mine.keys() == theirs.keys() and "activation_rms/2" in mine
        for name in mine.keys() - {"kind"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name


class Impatient(Regression):
    """Looks at every loss."""

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, torch.Tensor]) -> Loss:
        loss = super().loss(model, batch, denominators)
        assert loss.value.item() >= 0
        return loss


def steps_that_waited(folder: Path, monkeypatch: pytest.MonkeyPatch, task: Task, training: dict[str, Any]) -> list[int]:
    """The steps (of 21, with a record after every tenth) after which the host had waited since the step before."""
    waits, counts = Waits(), list[int]()

    class Counting(ToySource):
        def steps(self, states: Any) -> Any:
            for step in super().steps(states):
                counts.append(len(waits.seen))
                yield step

    to_list: Any = torch.Tensor.tolist  # on a CPU it is no operation
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (waits.seen.append("tolist"), to_list(tensor))[1])
    settings = {"max_steps": 21, "log_every": 10, "eval_every": 0, "save_every": 0, "max_skipped_steps": 30}
    run = make_run(
        folder, ListLog(), toy="mlp", task=task, source=Counting(alone()), checkpoints=None, evaluate=None,
        logging=LoggingSpec(norms_every=10, activation_norms=True), training=settings | training,
    )  # fmt: skip
    with waits:
        train(run)
    return [step for step, (before, after) in enumerate(pairwise(counts[1:]), start=2) if after > before]


@pytest.mark.parametrize("training", [{}, {"precision": "fp16"}, {"ema_decay": 0.0, "gradient_clip": 0.0}])
def test_between_two_records_the_host_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: dict[str, Any]
) -> None:
    """The operations are the same on every device; `tests/gpu` asks CUDA itself."""
    assert steps_that_waited(tmp_path, monkeypatch, Regression(), training) == [10, 20]


def test_a_task_that_waits_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_that_waited(tmp_path, monkeypatch, Impatient(), {}) == list(range(2, 21))


def test_the_smoothed_loss_does_not_depend_on_when_it_is_read(tmp_path: Path) -> None:
    ends: list[Any] = []
    for every in (1, 5, 15):
        log = ListLog()
        train(make_run(tmp_path / str(every), log, training={"log_every": every}))
        ends.append([r["loss_ema"] for r in log.records if r["kind"] == "train"][-1])
        losses = [float.fromhex(r["loss"]) for r in log.records if r["kind"] == "train"]
        if every == 1:
            weights = [0.98**k for k in reversed(range(len(losses)))]
            mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
            assert float.fromhex(ends[0]) == pytest.approx(mean, rel=1e-9)
    assert len(set(ends)) == 1


def test_a_smoothed_loss_survives_a_bad_one() -> None:
    smoothed = SmoothedLoss()
    assert smoothed.values() == {}
    for loss in (2.0, math.inf, math.nan, 2.0):
        smoothed.add(loss)
    assert smoothed.values() == {"loss_ema": pytest.approx(2.0)}


def test_activations_of_a_compiled_model_are_refused(tmp_path: Path) -> None:
    spec = LoggingSpec(activation_norms=True)
    with pytest.raises(UserError, match="compiled"):
        train(make_run(tmp_path, ListLog(), logging=spec, training={"compile": True}))


def test_peaks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12,
             "NVIDIA A10G": 70e12, "NVIDIA A100-SXM4-80GB": 312e12, "Unheard Of": 0.0}  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(cuda) == peak
    assert peak_flops(torch.device("cpu")) == 0.0
