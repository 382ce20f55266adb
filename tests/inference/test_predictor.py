"""Text in, text out, and what is refused on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.checkpoints import model, tokenizer, write_checkpoint
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.generation import generate
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.specs import SamplingSpec
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
    banned = predictor._banned
    steps = list(generate(predictor.model, [[tokenizer().eot_id, *ids]], max_new_tokens=30 - len(ids), banned=banned))
    expected = tokenizer().decode([token for [token] in steps if token is not None])
    assert predictor.generate("the cat sat", total_length=30, stop_at_eot=False) == expected
    longest = list(predictor._steps(["the cat sat"], 0, SamplingSpec(), 0, stop_at_eot=False))
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
        ("q" * 48, 0, "the prompt has 48 tokens and the model's context 48"),
        ("q" * 30, 30, "total_length .30. must be larger than the prompt's 30 tokens"),
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
