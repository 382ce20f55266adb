"""The masked-diffusion loss against its definition by enumeration; and cutting the work differently changes nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.inference.denoising import Denoiser
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer
from transformerlm.models.visibility import block_causal, masked_share, noisy_and_clean
from transformerlm.objectives.build import NoiseContext, build_objective
from transformerlm.objectives.diffusion import MaskedDiffusion
from transformerlm.objectives.dual import Dual
from transformerlm.objectives.noise import loss_weight, mask_probability, stratified_times
from transformerlm.objectives.specs import AutoregressiveSpec, DiffusionSpec, DualSpec

VOCAB, EOT, MASK = 5, 3, 4
SPEC = TransformerSpec(context_length=8, num_layers=2, d_model=16, num_heads=2)
FORBIDDEN = torch.tensor([False, False, False, False, True])
SAMPLES_PER_STEP = 8


@pytest.fixture(scope="module")
def model() -> Transformer:
    return opinionated(SPEC)


def opinionated(spec: TransformerSpec) -> Transformer:
    """Far from uniform, so that a wrong weight or place shows."""
    result = create_model(spec, vocab_size=VOCAB, seed=1).double()
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return result


def objective(**settings: Any) -> MaskedDiffusion:
    task = build_objective(DiffusionSpec(**settings), SPEC, context())
    assert isinstance(task, MaskedDiffusion)
    return task


def context(samples_per_step: int = SAMPLES_PER_STEP) -> NoiseContext:
    return NoiseContext(mask_id=MASK, forbidden=FORBIDDEN, samples_per_step=samples_per_step, max_steps=10, seed=3)


def make_batch(rows: int = 8, *, length: int = 8, first: int = 0, invalid: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(0, EOT + 1, (rows, length + 1), generator=generator),
        "documents": torch.randint(0, 2, (rows, length + 1), generator=generator).cumsum(dim=1),
        "sample": torch.arange(first, first + rows),
        "valid": torch.arange(rows) < rows - invalid,
    }


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def value_and_gradients(task: Any, model: Transformer, batches: list[Any]) -> tuple[float, list[Tensor]]:
    totals = [task.weights(batch) for batch in batches]
    denominators = {name: torch.stack([one[name] for one in totals]).sum() for name in totals[0]}
    model.zero_grad()
    value = sum(task.loss(model, batch, denominators).value for batch in batches)
    assert isinstance(value, Tensor)
    value.backward()
    return float(value.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def nats_of(model: Transformer, tokens: Tensor, masked: tuple[int, ...], alignment: str) -> Tensor:
    """−log p of each of the `masked` places of `tokens` [length], from the plain forward pass."""
    noisy = tokens.clone()
    noisy[list(masked)] = MASK
    logits = model(noisy.unsqueeze(0), causal=False)[0].masked_fill(FORBIDDEN, -math.inf)
    speaks = torch.tensor(masked) - int(alignment == "shifted")
    return F.cross_entropy(logits[speaks], tokens[list(masked)], reduction="none")


def mean_over_orders(model: Transformer, tokens: Tensor, eligible: list[int], alignment: str = "in_place") -> float:
    """The chain rule in every order in which the eligible places can be uncovered."""
    totals = []
    for order in itertools.permutations(eligible):
        hidden = set(eligible)
        total = 0.0
        for place in order:
            masked = tuple(sorted(hidden))
            total += float(nats_of(model, tokens, masked, alignment)[masked.index(place)])
            hidden.remove(place)
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("alignment", ["in_place", "shifted"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
@torch.no_grad()
def test_the_mean_loss_is_the_mean_chain_rule_over_all_orders(
    model: Transformer, schedule: Any, alignment: Any
) -> None:
    """Every schedule that reaches from no mask to all has the same mean: the bound itself."""
    length, draws = 4, 8192
    tokens = torch.tensor([2, 0, 3, 1, 0])
    task = replace(objective(schedule=schedule, alignment=alignment), samples_per_step=draws)
    batch = {
        "tokens": tokens.expand(draws, -1),
        "documents": torch.zeros(draws, length + 1, dtype=torch.int64),
        "sample": torch.arange(draws),
        "valid": torch.ones(draws, dtype=torch.bool),
    }
    values = []
    for step in range(6):
        noisy = task.prepare({**batch, "sample": batch["sample"] + step * draws}, step)
        values.append(float(task.loss(model, noisy, task.weights(noisy)).value))
    eligible = list(range(length)) if alignment == "in_place" else list(range(1, length))
    expected = mean_over_orders(model, tokens[:length], eligible, alignment) / len(eligible)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 6 * error + 1e-9
    assert error < 0.02 * expected


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "clipped"])
def test_the_weight_is_the_relative_slope_of_the_mask_probability(schedule: Any) -> None:
    spec = DiffusionSpec(schedule=schedule, exponent=1.7)
    time = torch.linspace(0.05, 0.95, 50, dtype=torch.float64, requires_grad=True)
    probability = mask_probability(spec, time)
    (slope,) = torch.autograd.grad(probability.sum(), time)
    torch.testing.assert_close(loss_weight(spec, time), slope / probability)
    ends = mask_probability(spec, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([0.3, 0.8] if schedule == "clipped" else [0.0, 1.0], abs=1e-12)


def test_times_fill_the_strata_of_a_step_whatever_the_cut() -> None:
    samples = torch.arange(24)
    times = stratified_times(3, samples, samples_per_step=8, blocks=4)
    for step in range(3):
        cells = (times[8 * step : 8 * step + 8] * 32).floor().flatten()
        assert sorted(cells.tolist()) == list(range(32))
    inside = (times * 32) % 1  # uniform in its stratum: the mean over a step has no bias
    assert abs(float(inside.mean()) - 1 / 2) < 0.1 and abs(float(inside.var()) - 1 / 12) < 0.02
    mixed = torch.tensor([17, 3, 9])
    assert torch.equal(stratified_times(3, mixed, samples_per_step=8, blocks=4), times[mixed])
    # A place in the step (a lane, say) has no fixed noise level.
    first = (stratified_times(3, torch.arange(0, 80, 8), samples_per_step=8) * 8).floor()
    assert len(set(first.flatten().tolist())) > 3


def test_a_row_does_not_depend_on_its_company() -> None:
    task = objective(random_length_fraction=0.5)
    whole = task.prepare(make_batch(), 0)
    for rows in (slice(0, 1), slice(3, 8)):
        alone = task.prepare(part(make_batch(), rows), 0)
        assert torch.equal(alone["noisy"], whole["noisy"][rows])
        assert torch.equal(alone["eligible"], whole["eligible"][rows])


def test_only_eligible_tokens_are_masked_and_the_rest_is_carried_over() -> None:
    batch = make_batch(invalid=2)
    batch["documents"][1, 5:] = -1
    for alignment in ("in_place", "shifted"):
        noisy = objective(alignment=alignment).prepare(batch, 0)
        masked = noisy["noisy"] == MASK
        expected = (batch["documents"][:, :-1] >= 0) & batch["valid"].unsqueeze(1)
        if alignment == "shifted":
            expected[:, 0] = False
        assert torch.equal(noisy["eligible"], expected)
        assert not (masked & ~expected).any() and masked.any()
        assert torch.equal(noisy["noisy"][~masked], batch["tokens"][:, :-1][~masked])
        real = noisy["mask_probability"] > 0
        assert torch.equal(noisy["masked"][real], masked.flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("settings", [{}, {"alignment": "shifted"}, {"block_size": 3}, {"loss_chunk_size": 3}])
def test_accumulation_gives_the_gradient_of_one_batch(model: Transformer, settings: dict[str, Any]) -> None:
    task = objective(**settings)
    batch = make_batch(invalid=1)
    whole = value_and_gradients(task, model, [task.prepare(batch, 0)])
    cut = value_and_gradients(task, model, [task.prepare(part(batch, rows), 0) for rows in (slice(0, 3), slice(3, 8))])
    assert whole[0] == pytest.approx(cut[0], rel=1e-12)
    for one, other in zip(whole[1], cut[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_gradient_against_finite_differences(model: Transformer) -> None:
    task = objective(block_size=4)
    batch = task.prepare(make_batch(), 0)
    _, gradients = value_and_gradients(task, model, [batch])
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                parameter.add_(sign * 1e-5 * direction)
                values.append(float(task.loss(model, batch, task.weights(batch)).value))
                parameter.sub_(sign * 1e-5 * direction)
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-7)


def test_only_masked_positions_reach_the_head(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: (seen.append(len(hidden)), head(hidden))[1])
    task = objective()
    batch = task.prepare(make_batch(), 0)
    task.loss(model, batch, task.weights(batch))
    count = int((batch["noisy"] == MASK).sum())
    assert count <= seen[0] < count + 8 + 1  # padded to a multiple of an eighth of the 64 positions


def test_fill_neither_counts_nor_is_seen(model: Transformer) -> None:
    batch = make_batch()
    batch["documents"][:, 5:] = -1
    other = {**batch, "tokens": batch["tokens"].clone()}
    other["tokens"][:, 5:] = 0
    task = objective()
    values = [value_and_gradients(task, model, [task.prepare(one, 0)]) for one in (batch, other)]
    assert values[0][0] == values[1][0]
    assert int(task.weights(task.prepare(batch, 0))["loss"]) == 8 * 5


def test_a_document_mask_hides_all_other_documents(model: Transformer) -> None:
    batch = make_batch()
    batch["documents"] = (torch.arange(9) >= 3).long().expand(8, -1)
    other = {**batch, "tokens": batch["tokens"].clone()}
    other["tokens"][:, :3] = 0

    @torch.no_grad()
    def nats_of_the_second(one: dict[str, Tensor], *, document_mask: bool) -> float:
        task = objective(document_mask=document_mask)
        noisy = task.prepare(one, 0)
        noisy["loss_weight"] = noisy["loss_weight"] * (noisy["masked"] % 8 >= 3)
        return float(task.loss(model, noisy, task.weights(noisy)).value)

    hidden, seen = ([nats_of_the_second(b, document_mask=m) for b in (batch, other)] for m in (True, False))
    assert hidden[0] == pytest.approx(hidden[1], rel=1e-12) and seen[0] != pytest.approx(seen[1], rel=1e-3)


@torch.no_grad()
def test_the_log_tells_the_loss_at_each_noise_level(model: Transformer) -> None:
    """The plain nats of the masked tokens, by how likely a mask was, and how many there are."""
    task = objective()
    batch = task.prepare(make_batch(invalid=1), 0)
    metrics = task.loss(model, batch, task.weights(batch)).metrics
    clean, masked = batch["tokens"][:, :-1], batch["noisy"] == MASK
    levels = stratified_times(3, batch["sample"], samples_per_step=SAMPLES_PER_STEP).expand(-1, 8)
    sums, counts = [0.0] * 4, [0] * 4
    for row, place in masked.nonzero().tolist():
        places = tuple(masked[row].nonzero().flatten().tolist())
        bucket = int(levels[row, place] * 4)
        sums[bucket] += float(nats_of(model, clean[row], places, "in_place")[places.index(place)])
        counts[bucket] += 1
    names = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    told = [metrics[f"masked_loss/{name}"] for name in names]
    assert [float(total) for total, _ in told] == pytest.approx(sums, rel=1e-6)
    assert [int(count) for _, count in told] == counts and sum(c > 0 for c in counts) > 2
    assert [int(value) for value in metrics["mask_fraction"]] == [sum(counts), 7 * 8]


def test_short_windows_have_every_length() -> None:
    batch = make_batch(rows=4000)
    noisy = objective(random_length_fraction=0.5).prepare(batch, 0)
    lengths = noisy["eligible"].sum(dim=1)
    counts = torch.bincount(lengths, minlength=9)
    # Of 9 lengths of the stored window each has 1/18, and the two longest leave all 8 tokens.
    assert counts[0] == 0 and (counts[1:8] > 150).all() and (counts[1:8] < 300).all()
    assert torch.equal(noisy["segments"] == 0, noisy["eligible"])


@torch.no_grad()
def test_each_block_sees_itself_and_a_clean_past(model: Transformer) -> None:
    """The doubled pass against one plain pass for each block, on the clean past and the noisy block alone."""
    task = objective(block_size=3)
    batch = task.prepare(make_batch(), 0)
    denoiser = Denoiser(model, MASK, FORBIDDEN, block_size=3)
    clean, noisy = batch["tokens"][:, :-1], batch["noisy"]
    chosen = noisy == MASK
    together = torch.full(chosen.shape, math.nan, dtype=torch.float64)
    together[chosen] = denoiser.nats_given_clean(noisy, clean, chosen)
    for start in range(0, 8, 3):
        end = min(start + 3, 8)
        text = torch.cat([clean[:, :start], noisy[:, start:end]], dim=1)
        asked = torch.zeros_like(text, dtype=torch.bool)
        asked[:, start:] = chosen[:, start:end]
        alone = denoiser.nats(text, clean[:, :end], asked)
        torch.testing.assert_close(together[:, start:end][chosen[:, start:end]], alone, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_a_block_as_long_as_the_window_is_plain_diffusion(model: Transformer) -> None:
    plain, blocks = objective(), objective(block_size=8)
    one, other = plain.prepare(make_batch(), 0), blocks.prepare(make_batch(), 0)
    assert torch.equal(one["noisy"], other["noisy"])
    values = [float(task.loss(model, b, task.weights(b)).value) for task, b in ((plain, one), (blocks, other))]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@torch.no_grad()
def test_blocks_of_one_fully_masked_token_are_the_chain_rule(model: Transformer) -> None:
    """At block size 1 and t = 1 the loss is the network's own likelihood, token by token."""
    task = objective(block_size=1)
    batch = make_batch()
    clean = batch["tokens"][:, :-1]
    places = torch.arange(clean.numel())
    ones = torch.ones(len(places))
    full = {
        **batch,
        "noisy": torch.full_like(clean, MASK),
        "eligible": torch.ones_like(clean, dtype=torch.bool),
        "masked": places,
        "loss_weight": ones,
        "mask_probability": ones,
    }
    value = float(task.loss(model, full, {"loss": torch.tensor(1.0)}).value)
    chain = 0.0
    for place in range(8):
        # The token itself is a mask; it and what stands before it see what stands before them.
        text = torch.cat([clean[:, :place], torch.full((8, 1), MASK)], dim=1)
        logits = model(text, causal=True)[:, -1].masked_fill(FORBIDDEN, -math.inf)
        chain += float(F.cross_entropy(logits, clean[:, place], reduction="sum"))
    assert value == pytest.approx(chain, rel=1e-10)


def test_information_flows_both_ways_inside_a_block_and_one_way_across(model: Transformer) -> None:
    table = model.embedding.weight
    tokens = torch.arange(8).unsqueeze(0) % 4

    def reach(**arguments: Any) -> Tensor:
        """bool [8, 8]: whether the logits at a place depend on the token at another."""
        embedded = table[tokens].detach().requires_grad_()
        handle = model.embedding.register_forward_hook(lambda *_: embedded)
        logits = model(tokens, **arguments)
        handle.remove()
        rows = [torch.autograd.grad(logits[0, i].sum().sin(), embedded, retain_graph=True)[0] for i in range(8)]
        return torch.stack([row[0].abs().sum(dim=-1) > 0 for row in rows])

    assert reach(causal=False).all()
    assert torch.equal(reach(causal=True), torch.ones(8, 8).tril().bool())
    block = torch.arange(8) // 3
    assert torch.equal(reach(causal=False, mask=block_causal(8, 3)), block.unsqueeze(1) >= block)


def test_the_share_of_masks_by_hand() -> None:
    tokens = torch.tensor([[MASK, 0, 0, 1, MASK, MASK, 2]])
    assert masked_share(tokens, MASK, 0)[0].tolist() == pytest.approx([3 / 7] * 7)
    assert masked_share(tokens, MASK, 3)[0].tolist() == pytest.approx([1 / 3] * 3 + [2 / 3] * 3 + [0.0])


def test_the_doubled_mask_by_hand() -> None:
    expected = [
        # noisy 0 1 2   clean 0 1 2, blocks of two
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert torch.equal(noisy_and_clean(3, 2), torch.tensor(expected).bool())


def dual(ar_weight: float, final_ar_weight: float) -> Dual:
    task = build_objective(DualSpec(ar_weight=ar_weight, final_ar_weight=final_ar_weight), SPEC, context())
    assert isinstance(task, Dual)
    return task


def test_dual_is_the_weighted_sum_of_its_halves(model: Transformer) -> None:
    batch = make_batch(invalid=1)
    ar = build_objective(AutoregressiveSpec(), SPEC)
    diffusion = objective(alignment="shifted")
    parts = [
        value_and_gradients(ar, model, [batch]),
        value_and_gradients(diffusion, model, [diffusion.prepare(batch, 0)]),
    ]
    for alpha in (0.0, 0.3, 1.0):
        task = dual(alpha, alpha)
        halves = [task.prepare(part(batch, rows), 0) for rows in (slice(0, 5), slice(5, 8))]
        value, gradients = value_and_gradients(task, model, halves)
        assert value == pytest.approx(alpha * parts[0][0] + (1 - alpha) * parts[1][0], rel=1e-6)
        for mixed, one, other in zip(gradients, parts[0][1], parts[1][1], strict=True):
            torch.testing.assert_close(mixed, alpha * one + (1 - alpha) * other, rtol=1e-6, atol=1e-8)


def test_alpha_moves_linearly_over_the_run() -> None:
    task = dual(1.0, 0.1)
    alphas = [float(task.prepare(make_batch(), step)["ar_weight"][0]) for step in range(12)]
    assert alphas[:10] == pytest.approx(np.linspace(1.0, 0.1, 10).tolist())
    assert alphas[10:] == pytest.approx([0.1, 0.1])
