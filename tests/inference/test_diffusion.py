"""Filling a canvas: the exact distribution by enumeration, caches against none, and what must never change."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.waits import Waits
from trainkit.random import Purpose, uniform
from transformerlm.inference.denoising import Denoiser
from transformerlm.inference.diffusion import Step, denoise
from transformerlm.inference.readers import Block, cut_blocks
from transformerlm.inference.sampling import invert_cumulative
from transformerlm.inference.specs import DenoisingSpec, SamplingSpec
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec

VOCAB, EOT, MASK = 5, 3, 4
LENGTH = 12
ORDERS = ["confidence", "margin", "entropy", "random", "first_hitting", "left_to_right"]


@cache
def denoiser(gain: float = 12.0, *, noise_embedding: bool = False, **settings: Any) -> Denoiser:
    spec = TransformerSpec(
        context_length=LENGTH, num_layers=2, d_model=16, num_heads=2, noise_embedding=noise_embedding
    )
    model = create_model(spec, vocab_size=VOCAB, seed=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return Denoiser(model, MASK, torch.tensor([False] * 4 + [True]), **settings)


def narrow(one: Denoiser) -> Denoiser:
    """The same in 32 bits, as models are used."""
    return replace(one, model=deepcopy(one.model).float())


def canvas_of(*texts: str) -> Tensor:
    """`e` end of text, `.` a mask, digits ids."""
    return torch.tensor([[{"e": EOT, ".": MASK}.get(c) or int(c.replace(".", "4")) for c in text] for text in texts])


def fill(one: Denoiser, canvas: Tensor, *, sampling: SamplingSpec | None = None, **options: Any) -> list[Step]:
    """All steps, each with a canvas of its own."""
    seed, rows, stop_id = (
        options.pop(name, default) for name, default in (("seed", 0), ("rows", None), ("stop_id", None))
    )
    steps = denoise(
        one, canvas, denoising=DenoisingSpec(**options), sampling=sampling or SamplingSpec(), seed=seed, rows=rows,
        stop_id=stop_id,
    )  # fmt: skip
    return [Step(**{**vars(step), "canvas": step.canvas.clone()}) for step in steps]


def exact_distribution(one: Denoiser, text: tuple[int, ...], order: str) -> dict[tuple[int, ...], float]:
    """The probability of every full text, by going through all that can be drawn."""
    masked = [i for i, token in enumerate(text) if token == MASK]
    if not masked:
        return {text: 1.0}
    tokens = torch.tensor([text])
    probs = one.logits(tokens, tokens == MASK).softmax(dim=-1)
    result: dict[tuple[int, ...], float] = {}
    for share, place in places_of(order, masked, probs):
        for token, p in enumerate(probs[masked.index(place)].tolist()):
            if p > 0:
                rest = exact_distribution(one, (*text[:place], token, *text[place + 1 :]), order)
                for outcome, q in rest.items():
                    result[outcome] = result.get(outcome, 0.0) + share * p * q
    return result


def places_of(order: str, masked: list[int], probs: Tensor) -> list[tuple[float, int]]:
    if order in ("random", "first_hitting"):
        return [(1 / len(masked), place) for place in masked]
    if order == "left_to_right":
        return [(1.0, masked[0])]
    sorted_probs = probs.sort(dim=-1, descending=True).values
    score = {
        "confidence": sorted_probs[:, 0],
        "margin": sorted_probs[:, 0] - sorted_probs[:, 1],
        "entropy": (probs * probs.clamp(min=1e-300).log()).sum(dim=-1),
    }[order]
    return [(1.0, masked[int(score.argmax())])]


@pytest.mark.parametrize("alignment", ["in_place", "shifted"])
@pytest.mark.parametrize("order", ORDERS)
def test_one_place_a_pass_samples_exactly(order: str, alignment: Any) -> None:
    """By Pearson's chi-square over all 64 texts of three tokens."""
    one = denoiser(alignment=alignment)
    count = 4000
    expected = exact_distribution(one, (EOT, MASK, MASK, MASK), order)
    assert sum(expected.values()) == pytest.approx(1.0)
    steps = fill(one, canvas_of("e...").expand(count, -1), order=order, seed=7)
    found: dict[tuple[int, ...], int] = {}
    for text in map(tuple, steps[-1].canvas.tolist()):
        found[text] = found.get(text, 0) + 1
    likely = [text for text, p in expected.items() if p * count >= 5]
    cells = [(found.get(text, 0), expected[text] * count) for text in likely]
    cells.append((count - sum(c[0] for c in cells), max(count - sum(c[1] for c in cells), 1e-9)))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells if wanted >= 1)
    freedom = len(cells) - 1
    assert freedom >= 5
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom) + 8  # far beyond the 99.9th percentile


def test_32_bit_gumbel_noise_lowers_the_temperature_and_ours_does_not() -> None:
    """A tail of a million and a half tokens that together have 9 %: 32-bit numbers are too coarse to reach it."""
    size, tail = 1_500_000, 0.09
    probs = torch.full((size,), tail / (size - 1), dtype=torch.float64)
    probs[0] = 1 - tail
    generator = torch.Generator().manual_seed(0)
    count = 150
    logits = probs.log().float()
    coarse = 0
    for _ in range(count):
        noise = torch.rand(size, generator=generator).log_().neg_().log_().neg_()
        coarse += int((logits + noise).argmax() != 0)
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ours = sum(int(invert_cumulative(probs.unsqueeze(0), number.reshape(1, 1)) != 0) for number in numbers)
    expected, deviation = count * tail, math.sqrt(count * tail * (1 - tail))
    assert abs(ours - expected) <= 1
    assert coarse < expected - 2 * deviation


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"tokens_per_step": 3}, {"threshold": 0.4}, {"block_length": 5}])
def test_given_text_stays_and_everything_else_is_filled(order: str, options: dict[str, Any]) -> None:
    canvas = canvas_of("e12.........", "e.........21", "e.0..1.....2", "............")
    canvas[3, 0] = EOT
    steps = fill(denoiser(), canvas, order=order, **options)
    given = canvas != MASK
    for step in steps:
        assert torch.equal(step.canvas[given], canvas[given])
    final = steps[-1].canvas
    assert not (final == MASK).any()
    drawn = {(r, p): t for step in steps for r, p, t in zip(step.rows, step.positions, step.tokens, strict=True)}
    assert len(drawn) == sum(len(step.rows) for step in steps) == int((~given).sum())
    assert all(int(final[row, place]) == token for (row, place), token in drawn.items())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 11, 40])
def test_no_more_passes_than_asked_for_and_nothing_need_divide(order: str, steps: int) -> None:
    canvas = canvas_of("e...........", "e11111......", "e1111111111.")
    taken = fill(denoiser(), canvas, order=order, steps=steps)
    assert len(taken) <= steps
    if order != "first_hitting":
        for row, count in enumerate([11, 6, 1]):
            each = [step.rows.count(row) for step in taken if row in step.rows]
            assert sum(each) == count and max(each) - min(each) <= 1


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_share_the_steps(order: str) -> None:
    taken = fill(denoiser(), canvas_of("e..........."), order=order, steps=6, block_length=4)
    assert len(taken) == 6 if order != "first_hitting" else len(taken) <= 6
    blocks = [[place // 4 for place in step.positions] for step in taken]
    assert all(len(set(block)) == 1 for block in blocks)
    assert list(itertools.chain(*blocks)) == [0] * 3 + [1] * 4 + [2] * 4


def test_first_hitting_fills_what_falls_into_a_part_of_the_time() -> None:
    """Few steps over many places: some parts of the time are empty and cost nothing; rows differ."""
    canvas = canvas_of("e...........").expand(50, -1)
    taken = fill(denoiser(), canvas, order="first_hitting", steps=8)
    passes = [sum(row in step.rows for step in taken) for row in range(50)]
    # Eleven places in eight parts: 8 · (1 − (7/8)^11) = 6.2 parts are hit on average.
    assert 5.6 < sum(passes) / 50 < 6.8


def test_at_least_one_place_and_all_sure_ones() -> None:
    canvas = canvas_of("e...........", "e12101......")
    for step in fill(denoiser(), canvas, threshold=1.0):
        assert {step.rows.count(row) for row in set(step.rows)} == {1}
    assert len(fill(denoiser(), canvas, threshold=1e-9)) == 1
    before, several = canvas, 0
    for step in fill(denoiser(), canvas, threshold=0.5):
        best = torch.full(canvas.shape, -1.0, dtype=torch.float64)
        best[before == MASK] = denoiser().logits(before, before == MASK).softmax(dim=-1).amax(dim=-1)
        wanted = (best >= 0.5) | ((best == best.amax(dim=1, keepdim=True)) & (best >= 0))
        assert list(zip(step.rows, step.positions, strict=True)) == [tuple(pair) for pair in wanted.nonzero().tolist()]
        before, several = step.canvas, several + (len(step.rows) > len(set(step.rows)))
    assert several


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_is_filled_alike_in_any_company(order: str) -> None:
    texts = ["e12.........", "e.........21", "e.0..1.....2"]
    together = fill(denoiser(), canvas_of(*texts), order=order, seed=4, rows=[5, 6, 9])[-1].canvas
    for text, number, row in zip(texts, [5, 6, 9], together, strict=True):
        alone = fill(denoiser(), canvas_of(text), order=order, seed=4, rows=[number])[-1].canvas
        assert torch.equal(alone[0], row)


@pytest.mark.parametrize("noise_embedding", [False, True])
@pytest.mark.parametrize("options", [{}, {"guidance": 1.5}, {"threshold": 0.6}])
def test_the_cache_of_finished_blocks_is_exact(options: dict[str, Any], noise_embedding: bool) -> None:
    one = denoiser(block_size=4, noise_embedding=noise_embedding)
    canvas = canvas_of("e12.........", "e12101......", "e...........")
    cached = fill(one, canvas, **options)

    def uncached(start: int, end: int) -> Any:
        def read(view: Tensor, asked: Tensor) -> Tensor:
            return one.logits(view[:, :end], asked[:, :end])

        return read

    for before, step in zip([canvas, *[s.canvas for s in cached]], cached, strict=False):
        end = (max(step.positions) // 4 + 1) * 4
        asked = torch.zeros_like(before, dtype=torch.bool)
        asked[step.rows, step.positions] = True
        logits = uncached(0, end)(before, asked)
        if "guidance" in options:
            prompt = canvas != MASK
            prompt[:, 0] = False
            free = uncached(0, end)(before.masked_fill(prompt, MASK), asked)
            logits = (2.5 * logits - 1.5 * free).masked_fill(one.forbidden, -math.inf)
        probs = logits.softmax(dim=-1)
        order = sorted(range(len(step.rows)), key=lambda i: (step.rows[i], step.positions[i]))
        expected = [float(probs[n, step.tokens[i]]) for n, i in enumerate(order)]
        assert [step.confidences[i] for i in order] == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("cache_kind", ["prefix", "dual"])
@pytest.mark.parametrize("settings", [{"alignment": "in_place"}, {"alignment": "shifted"}, {"noise_embedding": True}])
def test_an_approximate_cache_is_exact_at_the_start_of_a_block(settings: dict[str, Any], cache_kind: Any) -> None:
    one = denoiser(**settings)
    canvas = canvas_of("e12.........", "e........102")
    steps = fill(one, canvas, block_length=4, cache=cache_kind)
    plain = fill(one, canvas, block_length=4)
    assert (steps[0].positions, steps[0].tokens) == (plain[0].positions, plain[0].tokens)
    assert steps[0].confidences == pytest.approx(plain[0].confidences, rel=1e-10)
    assert not (steps[-1].canvas == MASK).any()
    # A block that is the whole canvas leaves nothing outside to be stale.
    whole = fill(one, canvas, block_length=LENGTH, cache=cache_kind)
    exact = fill(one, canvas, block_length=LENGTH)
    assert torch.equal(whole[-1].canvas, exact[-1].canvas)
    for step, other in zip(whole, exact, strict=True):
        assert step.confidences == pytest.approx(other.confidences, rel=1e-9)


def test_what_stands_outside_of_a_block_is_stale_in_an_approximate_cache() -> None:
    """The approximation is one: with a sharp model, later passes of a block see other numbers than without a cache."""
    canvas = canvas_of("e...........")
    stale, fresh = (
        fill(denoiser(), canvas, block_length=6, cache=kind, order="left_to_right") for kind in ("dual", "off")
    )
    differences = [abs(a.confidences[0] - b.confidences[0]) for a, b in zip(stale, fresh, strict=True)]
    assert differences[0] < 1e-9 and max(differences) > 1e-6


def test_nothing_is_drawn_behind_an_end_of_text_nor_one_before_given_text() -> None:
    texts = ["e..........." for _ in range(40)] + ["e.......0..2" for _ in range(40)]
    final = fill(denoiser(), canvas_of(*texts), order="random", stop_id=EOT)[-1].canvas[:, 1:]
    ended = 0
    for row in final[:40].tolist():
        if EOT in row:
            ended += 1
            assert MASK not in row[: row.index(EOT)]
    assert ended > 10
    assert (final[:40] == MASK).any(), "some rows have ended early"
    assert not ((final[40:] == EOT) | (final[40:] == MASK)).any()


def test_temperature_zero_takes_the_most_likely_token() -> None:
    one = denoiser()
    canvas = canvas_of("e1..........")
    before = canvas
    for step in fill(one, canvas, sampling=SamplingSpec(temperature=0)):
        asked = torch.zeros_like(before, dtype=torch.bool)
        asked[0, step.positions] = True
        assert int(one.logits(before, asked)[0].argmax()) == step.tokens[0]
        before = step.canvas


def test_top_k_and_the_repetition_penalty_reach_the_canvas() -> None:
    one = denoiser(gain=2.0)
    canvas = canvas_of("e...........").expand(20, -1)
    plain = fill(one, canvas)[-1].canvas
    narrow = fill(one, canvas, sampling=SamplingSpec(top_k=1))[-1].canvas
    assert len(set(map(tuple, narrow.tolist()))) == 1 < len(set(map(tuple, plain.tolist())))
    penalized = fill(one, canvas_of("e0.........."), sampling=SamplingSpec(repetition_penalty=1e6, temperature=0))
    assert penalized[0].tokens[0] != 0


def test_orders_differ_in_more_than_name() -> None:
    canvas = canvas_of("e...........")
    paths = {order: [step.positions[0] for step in fill(denoiser(), canvas, order=order, seed=3)] for order in ORDERS}
    assert paths["left_to_right"] == list(range(1, 12))
    assert paths["random"] == paths["first_hitting"]  # one at a time they are the same thing
    different = [paths[order] for order in ("confidence", "random", "left_to_right")]
    assert all(a != b for a, b in itertools.combinations(different, 2))


def by_hand(one: Denoiser, text: list[int], kept: int, numbers: list[float]) -> list[int]:
    """From left to right, the model asked about one place after the other; `kept` of a full context stay."""
    size, context = one.block_size, one.model.spec.context_length
    first = 0
    for start in range(0, len(text), size):
        end = min(start + size, len(text))
        if end - first > context:
            first = start - kept
        for place in range(start, end):
            if text[place] == MASK:
                asked = torch.arange(first, end).unsqueeze(0) == place
                probs = one.logits(torch.tensor([text[first:end]]), asked).softmax(dim=-1)
                text[place] = int(invert_cumulative(probs, torch.tensor([[numbers[place]]], dtype=torch.float64)))
    return text


@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_block_model_writes_on_when_its_context_is_full(size: int) -> None:
    """The kept half is 6 places in blocks of 3, 4 in blocks of 4, and 5 in blocks of 5, which do not divide 12."""
    one = denoiser(block_size=size)
    prompts = [[EOT, 1, 2], [EOT, *[0, 1, 2] * 5], [EOT]]
    canvas = torch.tensor([prompt + [MASK] * (31 - len(prompt)) for prompt in prompts])
    final = fill(one, canvas, order="left_to_right", seed=8)[-1].canvas
    numbers = uniform(8, Purpose.SAMPLING, torch.arange(3), 31).tolist()
    kept = {3: 6, 4: 4, 5: 5}[size]
    assert final.tolist() == [by_hand(one, *row) for row in zip(canvas.tolist(), [kept] * 3, numbers, strict=True)]
    assert len(set(map(tuple, final[:, -6:].tolist()))) == 3


@pytest.mark.parametrize("options", [{}, {"steps": 20}, {"threshold": 0.6}, {"guidance": 1.0}])
def test_the_cache_is_exact_in_every_window_of_a_long_text(options: dict[str, Any]) -> None:
    one = denoiser(block_size=4)
    canvas = torch.tensor([[EOT, 1, 2, *[MASK] * 30], [EOT, *[MASK] * 32]])
    before, seen = canvas, 0
    for step in fill(one, canvas, seed=3, **options):
        start = step.positions[0] // 4 * 4
        assert {place // 4 * 4 for place in step.positions} == {start}
        first = 0 if start + 4 <= 12 else start - 4 - (start // 4 - 3) % 2 * 4
        asked = torch.zeros_like(before, dtype=torch.bool)
        asked[step.rows, step.positions] = True
        view = [text[:, first : start + 4] for text in (before, asked, canvas)]
        logits = one.logits(view[0], view[1])
        if "guidance" in options:
            prompt = view[2] != MASK
            prompt[:, : max(1 - first, 0)] = False
            free = one.logits(view[0].masked_fill(prompt, MASK), view[1])
            logits = (2 * logits - free).masked_fill(one.forbidden, -math.inf)
        probs = logits.softmax(dim=-1)
        expected = [float(probs[n, token]) for n, token in enumerate(step.tokens)]
        assert step.confidences == pytest.approx(expected, rel=1e-9, abs=1e-12)
        before, seen = step.canvas, seen + len(step.rows)
    assert seen == int((canvas == MASK).sum())


def test_rows_of_a_long_text_do_not_know_of_each_other_and_end_alone() -> None:
    one = denoiser(block_size=4)
    texts = [[EOT, *[MASK] * 40], [EOT, 1, 2, *[MASK] * 38], [EOT, *[0, 1] * 9, *[MASK] * 22]]
    together = fill(one, torch.tensor(texts), seed=4, rows=[5, 6, 9], stop_id=EOT)[-1].canvas
    for text, number, row in zip(texts, [5, 6, 9], together.tolist(), strict=True):
        alone = fill(one, torch.tensor([text]), seed=4, rows=[number], stop_id=EOT)[-1].canvas[0].tolist()
        assert row == alone
        if EOT in row[1:]:
            assert MASK not in row[1 : row.index(EOT, 1)] and set(row[-4:]) == {MASK}
        else:
            assert MASK not in row
    assert any(EOT in row[1:] for row in together.tolist()), "the seed should show an end"


@pytest.mark.parametrize("settings", [{"alignment": "shifted"}, {"block_size": 4}])
def test_agreement_commits_what_the_judge_would_have_written(settings: dict[str, Any]) -> None:
    """Pass by pass against a search, token by token, for the first draft that the judge doubts."""
    one, judge, threshold = denoiser(**settings), denoiser(8.0).model, 0.25
    texts = ["e12.........", "e...0...1..2", "e..........."]
    length = 4 * LENGTH if "block_size" in settings else LENGTH
    canvas = torch.cat([canvas_of(*texts), torch.full((3, length - LENGTH), MASK)], dim=1)
    spec = DenoisingSpec(agreement=threshold, order="left_to_right")
    numbers = uniform(6, Purpose.SAMPLING, torch.arange(3), length)
    expected, runs = canvas.clone(), []
    for step in denoise(one, canvas, denoising=spec, seed=6, judge=judge):
        for row in set(step.rows):
            places = [p for r, p in zip(step.rows, step.positions, strict=True) if r == row]
            block = next(b for b in cut_blocks(length, one.block_size or length, LENGTH) if b.end > places[0])
            run = oracle(one, judge, expected[row], numbers[row], block, threshold)
            assert places == list(run)
            expected[row, places] = torch.tensor(list(run.values()))
            runs.append(len(run))
        assert torch.equal(step.canvas, expected)
    assert not (expected == MASK).any()
    assert 1 in runs and max(runs) > 2


def oracle(one: Denoiser, judge: Any, text: Tensor, numbers: Tensor, block: Block, threshold: float) -> dict[int, int]:
    """Places and tokens that one pass commits."""
    window = text[block.first : block.end].unsqueeze(0)
    probs = one.logits(window, window == MASK).softmax(dim=-1)
    drafts: dict[int, int] = {}
    for (_, column), row in zip((window == MASK).nonzero().tolist(), probs, strict=True):
        place = block.first + column
        if place >= block.start:
            cumulative = list(itertools.accumulate(row.tolist()))
            drafts[place] = next(i for i, total in enumerate(cumulative) if total > numbers[place] * cumulative[-1])
    run: dict[int, int] = {}
    written = text.clone()
    for place, token in drafts.items():
        with torch.no_grad():
            after = judge(written[block.first : place].unsqueeze(0))[0, -1].masked_fill(one.forbidden, -math.inf)
        is_doubted = float(after.softmax(dim=-1)[token]) < threshold
        if not (run and is_doubted):
            run[place] = written[place] = token
        if is_doubted:
            break
    return run


def test_a_threshold_that_nothing_reaches_commits_a_token_a_pass_and_one_that_all_do_a_block() -> None:
    one, canvas = denoiser(), canvas_of("e...........")
    for threshold, passes in ((1.0, 11), (1e-300, 1)):
        spec = DenoisingSpec(agreement=threshold, order="left_to_right")
        assert len(list(denoise(one, canvas, denoising=spec, judge=denoiser(2.0).model))) == passes


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_of_32_bits_chooses_and_draws_as_one_of_64(order: str) -> None:
    """Places are chosen in the model's type, tokens drawn in 64 bits; on these texts no choice is that close."""
    canvas, sampling = canvas_of("e..0........"), SamplingSpec(top_p=0.95, temperature=0.7)
    wide, slim = (
        fill(one, canvas, order=order, guidance=0.5, threshold=0.9, sampling=sampling, seed=3)
        for one in (denoiser(), narrow(denoiser()))
    )
    assert [(step.positions, step.tokens) for step in slim] == [(step.positions, step.tokens) for step in wide]
    drawn = [value for step in slim for value in step.confidences]
    assert drawn == pytest.approx([value for step in wide for value in step.confidences], rel=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.9}, {"order": "left_to_right", "agreement": 0.3, "block_length": 4}], ids=str
)
def test_a_pass_waits_for_which_places_it_has_chosen(options: dict[str, Any]) -> None:
    """And, which no operation tells, for the copy of their tokens."""
    judge = denoiser().model if "agreement" in options else None
    steps = denoise(denoiser(), canvas_of("e..........."), denoising=DenoisingSpec(**options), judge=judge)
    next(steps)
    with Waits() as waits:
        next(steps)
    on_the_host = ["_local_scalar_dense", "nonzero", "nonzero"]  # of its own copy: is any open, which, and which now
    assert sorted(waits.seen) == sorted([*on_the_host, "nonzero"])
