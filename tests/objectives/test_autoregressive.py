"""The autoregressive loss against its definition, and that cutting the work differently changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.task import Task
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer
from transformerlm.objectives.build import build_objective
from transformerlm.objectives.specs import AutoregressiveSpec

VOCAB = 60
SPEC = TransformerSpec(context_length=16, num_layers=2, d_model=32, num_heads=2)


@pytest.fixture
def model() -> Transformer:
    return create_model(SPEC, vocab_size=VOCAB, seed=1).double()


def make_batch(rows: int = 4, *, invalid: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(0, VOCAB, (rows, 17), generator=generator),
        "documents": torch.randint(0, 2, (rows, 17), generator=generator).cumsum(dim=1),
        "sample": torch.arange(rows),
        "valid": torch.arange(rows) < rows - invalid,
    }


def value_and_gradients(
    task: Task, model: torch.nn.Module, batches: list[dict[str, Tensor]]
) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    totals = [task.weights(batch) for batch in batches]
    denominators = {name: torch.stack([part[name] for part in totals]).sum() for name in totals[0]}
    model.zero_grad()
    losses = [task.loss(model, batch, denominators) for batch in batches]
    value = torch.stack([loss.value for loss in losses]).sum()
    value.backward()
    metrics = {
        name: float(sum(loss.metrics[name][0] for loss in losses) / sum(loss.metrics[name][1] for loss in losses))
        for name in losses[0].metrics
    }
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], metrics


@torch.no_grad()
def definition(
    model: Transformer, batch: dict[str, Tensor], *, document_mask: bool = True, z_loss: float = 0.0
) -> float:
    """Token by token: each is predicted from the tokens of its document that stand before it in the window."""
    nats: list[float] = []
    squares: list[float] = []
    for row in range(len(batch["valid"])):
        if not batch["valid"][row]:
            continue
        tokens, documents = batch["tokens"][row], batch["documents"][row]
        for target in range(1, len(tokens)):
            if documents[target] < 0:
                continue
            before = [i for i in range(target) if not document_mask or documents[i + 1] == documents[target]]
            logits = model(tokens[before].unsqueeze(0))[0, -1]
            nats.append(float(-logits.log_softmax(dim=-1)[tokens[target]]))
            squares.append(float(logits.exp().sum().log() ** 2))
    return sum(nats) / len(nats) + z_loss * sum(squares) / len(squares)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_loss_is_the_mean_over_valid_tokens(model: Transformer, document_mask: bool, z_loss: float) -> None:
    spec = TransformerSpec(**{**SPEC.__dict__, "document_mask": document_mask})
    task = build_objective(AutoregressiveSpec(z_loss=z_loss), spec)
    batch = make_batch(3, invalid=1)
    value, _, metrics = value_and_gradients(task, model, [batch])
    expected = definition(model, batch, document_mask=document_mask, z_loss=z_loss)
    assert float(value) == pytest.approx(expected, rel=1e-10)
    assert metrics["loss"] == pytest.approx(definition(model, batch, document_mask=document_mask), rel=1e-10)
    assert metrics.keys() == ({"loss", "z_loss"} if z_loss else {"loss"})


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize("document_mask", [True, False])
def test_fill_counts_nothing(model: Transformer, document_mask: bool, chunk_size: int) -> None:
    """Fill at the end of a row, a whole row of it, and in the midst of one, where it is looked at by the next text."""
    spec = TransformerSpec(**{**SPEC.__dict__, "document_mask": document_mask})
    task = build_objective(AutoregressiveSpec(z_loss=0.3, loss_chunk_size=chunk_size), spec)
    batch = make_batch(5, invalid=1)
    documents = batch["documents"]
    documents[0, 11:] = documents[1, 1:] = documents[2, 6] = documents[4, 3:] = -1
    value, gradients, metrics = value_and_gradients(task, model, [batch])
    assert float(value) == pytest.approx(definition(model, batch, document_mask=document_mask, z_loss=0.3), rel=1e-10)
    assert int(task.weights(batch)["loss"]) == 10 + 0 + 15 + 16
    assert metrics["loss"] == pytest.approx(definition(model, batch, document_mask=document_mask), rel=1e-10)
    alone = {name: tensor[torch.tensor([0, 2, 3])] for name, tensor in batch.items()}
    for ours, other in zip(gradients, value_and_gradients(task, model, [alone])[1], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    if document_mask:  # what stands in fill that nothing looks at does not matter
        other = {**batch, "tokens": batch["tokens"].clone()}
        other["tokens"][0, 12:] = 7
        assert value_and_gradients(task, model, [other])[0].equal(value)


def test_the_end_of_a_document_opens_the_next(model: Transformer) -> None:
    """The first token of document B is predicted from the end-of-text that closes A, and from nothing else of A."""
    task = build_objective(AutoregressiveSpec(), SPEC)
    batch = make_batch(1)
    batch["documents"] = (torch.arange(17) >= 9).long().unsqueeze(0)  # token 8 ends A
    value, _, _ = value_and_gradients(task, model, [batch])
    tokens = batch["tokens"]
    nats = [F.cross_entropy(model(part[:, :-1])[0], part[0, 1:]).detach() for part in (tokens[:, :9], tokens[:, 8:])]
    assert float(value) == pytest.approx(float(nats[0] + nats[1]) / 2, rel=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 63, 64, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_chunks_change_neither_value_nor_gradient(model: Transformer, chunk_size: int, z_loss: float) -> None:
    batch = make_batch(4, invalid=1)
    whole, chunked = (
        value_and_gradients(
            build_objective(AutoregressiveSpec(z_loss=z_loss, loss_chunk_size=size), SPEC), model, [batch]
        )
        for size in (0, chunk_size)
    )
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-12, atol=1e-12)
    for ours, other in zip(chunked[1], whole[1], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)


def test_uneven_micro_batches_give_the_gradient_of_the_whole(model: Transformer) -> None:
    task = build_objective(AutoregressiveSpec(z_loss=0.1), SPEC)
    batch = make_batch(6, invalid=2)
    parts = [{name: tensor[place] for name, tensor in batch.items()} for place in (slice(0, 1), slice(1, 6))]
    whole, split = value_and_gradients(task, model, [batch]), value_and_gradients(task, model, parts)
    torch.testing.assert_close(split[0], whole[0])
    assert split[2] == pytest.approx(whole[2])
    for ours, other in zip(split[1], whole[1], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)


def test_rows_that_fill_up_count_nothing(model: Transformer) -> None:
    task = build_objective(AutoregressiveSpec(z_loss=0.1), SPEC)
    batch = make_batch(4, invalid=2)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["tokens"][2:] = 0
    first, second = value_and_gradients(task, model, [batch]), value_and_gradients(task, model, [other])
    assert first[0].equal(second[0])
    assert all(a.equal(b) for a, b in zip(first[1], second[1], strict=True))
    nothing = {name: tensor[2:] for name, tensor in batch.items()}
    assert int(task.weights(nothing)["loss"]) == 0
    one = torch.tensor(1.0)
    assert task.loss(model, nothing, {"loss": one, "z_loss": one}).value.item() == 0.0


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_compiles_to_one_graph_that_is_used_again(model: Transformer, chunk_size: int) -> None:
    task = build_objective(AutoregressiveSpec(z_loss=0.1, loss_chunk_size=chunk_size), SPEC)
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (slice(0, 2), slice(2, 4)):
        batch = {name: tensor[rows] for name, tensor in make_batch(4).items()}
        ours, other = value_and_gradients(task, compiled, [batch]), value_and_gradients(task, model, [batch])
        torch.testing.assert_close(ours[0], other[0])
        for a, b in zip(ours[1], other[1], strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
