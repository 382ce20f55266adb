"""Text in, text out, and what is refused on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.checkpoints import model, tokenizer, write_checkpoint
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.generation import generate
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.specs import DenoisingSpec, SamplingSpec
from transformerlm.models.build import create_model
from transformerlm.models.specs import Reading
from transformerlm.tokenizer.text_ids import checked_mask_id
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.dtypes import resolve_device, resolve_dtype


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(model(), tokenizer())


def test_pieces_join_to_the_text_and_a_batch_gives_the_same(predictor: Predictor) -> None:
    prompts = ["the cat", "", "the dog ate"]
    batch = predictor.generate_batch(prompts, total_length=40, seed=5)
    assert predictor.generate(prompts[0], total_length=40, seed=5) == batch[0]
    pieces = list(predictor.stream(prompts[0], total_length=40, seed=5))
    assert "".join(pieces) == batch[0] and len(pieces) > 3
    assert predictor.generate(prompts[0], total_length=40, seed=6) != batch[0]


def test_the_total_length_counts_prompt_and_continuation(predictor: Predictor) -> None:
    ids = tokenizer().encode("the cat sat").tolist()
    banned = predictor._without_text
    steps = list(generate(predictor.model, [[tokenizer().eot_id, *ids]], max_new_tokens=30 - len(ids), banned=banned))
    expected = tokenizer().decode([token for [token] in steps if token is not None])
    assert predictor.generate("the cat sat", total_length=30, stop_at_eot=False) == expected
    longest = list(predictor._continuations(["the cat sat"], 0, SamplingSpec(), 0, stop_at_eot=False))
    assert len(longest) == predictor.model.spec.context_length - len(ids)


def test_special_tokens_in_a_prompt_are_plain_text_and_none_is_generated(predictor: Predictor) -> None:
    flat = SamplingSpec(temperature=50.0)
    texts = predictor.generate_batch(["<|endoftext|>"] * 20, sampling=flat, seed=1)
    assert any(texts) and not any("<|" in text for text in texts)


def test_a_text_stops_where_the_model_ends_it(predictor: Predictor) -> None:
    free = predictor.generate_batch(["the"] * 40, sampling=SamplingSpec(temperature=3.0), stop_at_eot=False)
    stopped = predictor.generate_batch(["the"] * 40, sampling=SamplingSpec(temperature=3.0))
    assert any("<|endoftext|>" in text for text in free), "the seed should show an end"
    assert stopped == [text.split("<|endoftext|>")[0] for text in free]


@pytest.mark.parametrize(
    ("prompt", "total_length", "message"),
    [
        ("the cat", 49, "total_length .49. exceeds the model's context of 48"),
        ("q" * 48, 0, "48 tokens of prompt fill the model's context of 48"),
        ("q" * 30, 30, "total_length .30. must be larger than the 30 tokens of prompt;"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_anything_runs(
    predictor: Predictor, prompt: str, total_length: int, message: str
) -> None:
    for call in (predictor.generate, predictor.stream):
        with pytest.raises(UserError, match=message) as error:
            call(prompt, total_length=total_length)
        assert error.value.exit_code == EXIT_USAGE


def test_a_checkpoint_becomes_a_predictor(tmp_path: Path, predictor: Predictor) -> None:
    write_checkpoint(tmp_path, 0)
    loaded = Predictor.from_checkpoint(tmp_path, device="cpu")
    assert loaded.generate("the", seed=3) == predictor.generate("the", seed=3)
    rough = Predictor.from_checkpoint(tmp_path, device="cpu", precision="bf16")
    assert rough.model.embedding.weight.dtype == torch.bfloat16
    assert rough.generate("the", total_length=9, stop_at_eot=False)


def test_names_of_types_and_devices() -> None:
    assert resolve_dtype("bf16") is torch.bfloat16
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="fp32"):
        resolve_dtype("float")
    with pytest.raises(UserError, match="no device 'cuda:99'"):
        resolve_device("cuda:99")
    with pytest.raises(UserError, match="no device 'meta'"):
        resolve_device("meta")
    with pytest.raises(UserError, match="unknown"):
        resolve_device("quantum")


@pytest.fixture(scope="module")
def dual() -> Predictor:
    return Predictor(model(), tokenizer(), Reading(modes=("ar", "diffusion")))


def test_a_canvas_is_filled_between_prompt_and_suffix(dual: Predictor) -> None:
    text = dual.generate("the cat", suffix=" the mat", mode="diffusion", total_length=30, seed=3)
    *_, last = dual.denoise(["the cat"], suffix=" the mat", total_length=30, seed=3)
    tokens = tokenizer()
    assert last.canvas.shape == (1, 31)
    start, end = tokens.encode("the cat").tolist(), tokens.encode(" the mat").tolist()
    row = last.canvas[0].tolist()
    assert row[: 1 + len(start)] == [tokens.eot_id, *start] and row[-len(end) :] == end
    assert tokens.decode(row[1:]) == "the cat" + text + " the mat"


def test_a_diffusion_batch_is_its_texts_and_stops_where_the_model_ends_them(dual: Predictor) -> None:
    prompts = ["the cat", "", "the dog ate"]
    batch = dual.generate_batch(prompts, mode="diffusion", total_length=40, seed=5)
    assert dual.generate("the cat", mode="diffusion", total_length=40, seed=5) == batch[0]
    assert not any("<|" in text for text in batch)
    short = dual.generate_batch(["the"] * 30, mode="diffusion", sampling=SamplingSpec(temperature=5.0))
    assert len({len(text) for text in short}) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "diffusion"}, "trained for ar"),
        ({"suffix": "the mat"}, "cannot look ahead"),
    ],
)
def test_an_autoregressive_model_is_not_asked_for_diffusion(
    predictor: Predictor, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        predictor.generate("the cat", **settings)
    assert error.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("the", {"mode": "ar"}, "trained for diffusion"),
        ("", {"denoising": DenoisingSpec(guidance=1.0)}, "the prompt is empty"),
        ("the", {"denoising": DenoisingSpec(block_length=5)}, "trained in blocks of 4"),
        ("the", {"total_length": 48, "suffix": "mat"}, "context of 48 tokens, one of which begins it"),
        ("the", {"denoising": DenoisingSpec(agreement=0.5, order="left_to_right")}, "trained for diffusion only"),
        ("the", {"total_length": 2, "suffix": "the"}, "must be larger than the 2 tokens of prompt and suffix"),
    ],
)
def test_what_a_block_diffusion_model_cannot_do(prompt: str, settings: dict[str, Any], message: str) -> None:
    blocks = Predictor(model(), tokenizer(), Reading(modes=("diffusion",), alignment="in_place", block_size=4))
    with pytest.raises(UserError, match=message):
        blocks.generate(prompt, **settings)


def test_a_mask_that_is_another_token_too_is_refused() -> None:
    shared = tokenizer().vocabulary
    specials = {**shared.special_tokens, "<|mask|>": shared.special_tokens["<|endoftext|>"]}
    with pytest.raises(UserError, match="the same id"):
        checked_mask_id(Tokenizer(replace(shared, special_tokens=specials)))


def test_only_a_block_model_writes_more_than_its_context_holds(dual: Predictor) -> None:
    reading = Reading(modes=("diffusion",), alignment="in_place", block_size=4)
    blocks = Predictor(model(), tokenizer(), reading)
    *_, last = blocks.denoise(["the cat", "", "q" * 60], total_length=130, stop_at_eot=False, seed=2)
    assert last.canvas.shape == (3, 131) and not (last.canvas == blocks.denoiser.mask_id).any()
    texts = blocks.generate_batch(["the cat", ""], total_length=130, stop_at_eot=False, seed=2)
    assert texts == [
        blocks.new_text(last.canvas[row], prompt, stop_at_eot=False) for row, prompt in enumerate(["the cat", ""])
    ]
    row = last.canvas[1].clone()
    row[9] = blocks.tokenizer.eot_id  # ends a text, or is a token like the others
    for stops, count in ((True, 8), (False, 130)):
        assert blocks.new_text(row, "", stop_at_eot=stops) == blocks.tokenizer.decode(row[1 : 1 + count].tolist())
    with pytest.raises(UserError, match="must be larger than the 60 tokens of prompt"):
        blocks.generate("q" * 60, total_length=60)
    for other in (dual, Predictor(model(), tokenizer(), replace(reading, block_size=32))):
        with pytest.raises(UserError, match=r"total_length .130. exceeds the model's context"):
            other.generate("the cat", mode="diffusion", total_length=130)


def test_a_model_that_is_to_agree_must_know_the_same_tokens_and_see_as_far(dual: Predictor) -> None:
    spec = DenoisingSpec(agreement=0.2, order="left_to_right")
    assert dual.generate("the", mode="diffusion", denoising=spec, seed=1)
    *_, last = dual.denoise(["the"], denoising=spec, seed=1, judge=model(5))
    assert last.canvas.shape == (1, 48)
    small = create_model(replace(model().spec, context_length=20), vocab_size=tokenizer().vocab_size)
    other = create_model(model().spec, vocab_size=tokenizer().vocab_size + 1)
    for judge in (small, other):
        with pytest.raises(UserError, match="the model that is to agree has"):
            dual.denoise(["the"], denoising=spec, judge=judge)


@pytest.mark.parametrize("options", [{"steps": 3}, {"tokens_per_step": 2}, {"threshold": 0.5}, {"order": "random"}])
def test_agreement_goes_its_own_way(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="agreement says itself"):
        DenoisingSpec(**{"agreement": 0.5, "order": "left_to_right", **options})
