"""Generation: the cache changes nothing, prompts do not affect each other, limits hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainkit.errors import UserError
from transformerlm.inference.generation import generate
from transformerlm.inference.sampling import random_numbers, sample_tokens
from transformerlm.inference.specs import SamplingSpec
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer

VOCAB = 90
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2], [11, 12, 13]]


def small_model(**changes: Any) -> Transformer:
    values = {"context_length": 40, "num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2}
    model = create_model(TransformerSpec(**(values | changes)), vocab_size=VOCAB, seed=4).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def columns(steps: list[list[int | None]]) -> list[list[int]]:
    """Per prompt what it got; None only after its end."""
    result: list[list[int]] = []
    for column in zip(*steps, strict=True):
        ids = [token for token in column if token is not None]
        assert list(column[: len(ids)]) == ids
        result.append(ids)
    return result


def without_cache(
    model: Transformer, prompt: list[int], count: int, spec: SamplingSpec, *, seed: int, row: int
) -> list[int]:
    """The definition: all positions anew for each token."""
    tokens, numbers = list(prompt), random_numbers(seed, torch.tensor([row]), count)
    for step in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[:, -1]
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, tokens] = True
        new = sample_tokens(logits, spec, numbers[:, step], seen=seen)
        tokens.append(int(new))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "spec",
    [SamplingSpec(), SamplingSpec(temperature=0.0), SamplingSpec(top_k=9, top_p=0.9, repetition_penalty=1.3)],
    ids=["plain", "greedy", "filtered"],
)
def test_cached_and_uncached_decoding_choose_the_same_ids(spec: SamplingSpec, backend: Any) -> None:
    model = small_model(attention_backend=backend)
    together = columns(list(generate(model, PROMPTS, max_new_tokens=30, sampling=spec, seed=3)))
    for row, prompt in enumerate(PROMPTS):
        expected = without_cache(model, prompt, 30, spec, seed=3, row=row)
        alone = columns(list(generate(model, [prompt], max_new_tokens=30, sampling=spec, seed=3, rows=[row])))
        assert together[row] == alone[0] == expected
        assert spec.temperature == 0 or len(set(expected)) > 9, "a model that repeats itself proves little"


def test_prompts_of_one_length_need_no_mask_and_get_the_same() -> None:
    model = small_model()
    prompts = [PROMPTS[0], PROMPTS[3]]
    pair = columns(list(generate(model, prompts, max_new_tokens=10, rows=[0, 3])))
    mixed = columns(list(generate(model, PROMPTS, max_new_tokens=10)))
    assert pair == [mixed[0], mixed[3]]


def test_a_prompt_ends_at_its_own_limit_and_may_fill_the_context() -> None:
    model = small_model()
    limits = [41 - len(prompt) for prompt in PROMPTS]
    results = columns(list(generate(model, PROMPTS, max_new_tokens=limits)))
    assert [len(ids) for ids in results] == limits
    assert results[2] == without_cache(model, PROMPTS[2], limits[2], SamplingSpec(), seed=0, row=2)
    assert columns(list(generate(model, PROMPTS, max_new_tokens=[2, 0, 1, 2])))[1] == []


def test_a_stop_ends_its_prompt_only() -> None:
    model = small_model()
    free = columns(list(generate(model, PROMPTS, max_new_tokens=20)))
    stop_id = free[0][4]
    stopped = columns(list(generate(model, PROMPTS, max_new_tokens=20, stop_id=stop_id)))
    for ids, whole in zip(stopped, free, strict=True):
        assert ids == (whole[: whole.index(stop_id) + 1] if stop_id in whole else whole)
    assert len(list(generate(model, [PROMPTS[0]], max_new_tokens=20, stop_id=stop_id))) == free[0].index(stop_id) + 1


def test_the_end_is_no_repetition() -> None:
    """Prompts begin with the end-of-text id: a penalty on it would make every text longer."""
    model, stop_id = small_model(), 7
    penalized = SamplingSpec(repetition_penalty=1e6, temperature=0.0)
    with torch.no_grad():
        model.embedding.weight[stop_id] *= 100.0  # by far the most likely after itself
    assert columns(list(generate(model, [[stop_id]], max_new_tokens=3, sampling=penalized, stop_id=stop_id))) == [
        [stop_id]
    ]
    assert columns(list(generate(model, [[stop_id]], max_new_tokens=1, sampling=penalized))) != [[stop_id]]


def test_banned_ids_and_padded_ids_never_appear() -> None:
    model = small_model()
    banned = torch.zeros(VOCAB, dtype=torch.bool)
    banned[::2] = True
    flat = SamplingSpec(temperature=100.0)
    drawn = {i for ids in columns(list(generate(model, PROMPTS * 8, max_new_tokens=30, sampling=flat))) for i in ids}
    assert max(drawn) < VOCAB < model.embedding.weight.shape[0] and len(drawn) > 80
    steps = generate(model, PROMPTS * 8, max_new_tokens=30, sampling=flat, banned=banned)
    assert all(token is None or token % 2 for ids in steps for token in ids)


def test_the_model_generates_tensors() -> None:
    model = small_model()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    result = model.generate(tokens, 5, temperature=0.5, top_k=10, seed=2)
    assert result.shape == (2, 8) and result.dtype == torch.int64 and result[:, :3].equal(tokens)
    assert result[1, 3:].tolist() == without_cache(
        model, [4, 5, 6], 5, SamplingSpec(temperature=0.5, top_k=10), seed=2, row=1
    )
    assert model.generate(tokens[0], 5, temperature=0.5, top_k=10, seed=2).equal(result[0])
    assert not result.requires_grad and model.generate(tokens, 0).equal(tokens)
    assert model.generate(tokens, 38).shape == (2, 41)
    with pytest.raises(UserError, match=r"3 tokens and 39 more .* context of 40"):
        model.generate(tokens, 39)
    with pytest.raises(UserError, match="at least one token"):
        model.generate(tokens[:, :0], 2)


def test_a_compiled_model_generates_without_compiling_again() -> None:
    model = small_model()
    expected = model.generate(torch.tensor([[1, 2, 3]]), 5)

    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("generation must not compile")

    model.compile(backend=refuse)
    assert model.generate(torch.tensor([[1, 2, 3]]), 5).equal(expected)
