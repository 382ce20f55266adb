"""Continuing token sequences with a cache of keys and values: a prefill, then one position at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from profiling import nvtx
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.sampling import random_numbers, sample_tokens
from transformerlm.inference.specs import DEFAULT_SAMPLING, SamplingSpec
from transformerlm.models.cache import KeyValueCache
from transformerlm.models.transformer import Head, Transformer

_PADDING, _TEXT = -1, 0
"""Segments: the padding before a short prompt is a document of its own, which the text cannot see."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingSpec = DEFAULT_SAMPLING,
    seed: int = 0,
    stop_id: int | None = None,
    banned: Tensor | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, each prompt's next id; None for a prompt that has ended, at its limit or by a `stop_id`.

    Prompts are not empty, of any lengths, and do not affect each other; begin them with the end-of-text id, as every
    document in training began. All but the last id of a continued prompt must fit into the model's context.
    `rows` names each prompt's random numbers (default 0, 1, …): with the same seed and row a prompt is continued alike
    in any company. `banned` (bool [vocab_size]) marks ids that are never chosen. The `stop_id` itself is yielded, and
    exempt from the repetition penalty.
    """
    count, longest, context_length = len(prompts), max(map(len, prompts)), model.spec.context_length
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    assert all(map(len, prompts)), "a prompt needs at least one token"
    assert all(len(prompt) + limit - 1 <= context_length for prompt, limit in zip(prompts, limits, strict=True))
    table = model.embedding.weight
    cache = KeyValueCache(
        model.spec, batch_size=count, capacity=longest + max(limits) - 1, device=table.device, dtype=table.dtype
    )
    tokens, segments, positions = _align_right(prompts, table.device)
    # Samplers need 64-bit floats, which Apple's GPUs do not have.
    sampler_device = torch.device("cpu") if table.device.type == "mps" else table.device
    row_ids = torch.tensor(range(count) if rows is None else rows, device=sampler_device)
    numbers = random_numbers(seed, row_ids, max(limits))
    seen = _seen(prompts, model.vocab_size, sampler_device) if sampling.repetition_penalty != 1.0 else None
    if banned is not None:
        banned = banned.to(sampler_device)
    has_ended = [limit == 0 for limit in limits]
    for step in range(max(limits)):
        with nvtx.range("decode" if step else "prefill"):
            logits = _next_logits(model, tokens, segments=segments, positions=positions, cache=cache)
            with nvtx.range("draw", "fine"):
                logits = logits.to(sampler_device)
                if banned is not None:
                    logits = logits.masked_fill(banned, -math.inf)
                if seen is not None and stop_id is not None:
                    seen[:, stop_id] = False
                new = sample_tokens(logits, sampling, numbers[:, step], seen=seen)
                if seen is not None:
                    seen.scatter_(1, new.unsqueeze(1), True)
                ids: list[int] = new.tolist()
        yield [None if ended else token for ended, token in zip(has_ended, ids, strict=True)]
        has_ended = [
            ended or token == stop_id or step + 1 == limit
            for ended, token, limit in zip(has_ended, ids, limits, strict=True)
        ]
        if all(has_ended):
            return
        tokens = new.unsqueeze(1).to(table.device)
        if segments is not None and positions is not None:
            # A prompt that has ended is carried along, and must not run out of the rotary table meanwhile.
            segments, positions = torch.full_like(tokens, _TEXT), (positions[:, -1:] + 1).clamp(max=context_length - 1)


def extend(model: Transformer, tokens: Tensor, max_new_tokens: int, *, seed: int = 0, **sampling: float) -> Tensor:
    """`tokens` (int64 [batch, length] or [length]) with `max_new_tokens` more; see `Transformer.generate`."""
    prompts, context_length = torch.atleast_2d(tokens).tolist(), model.spec.context_length
    length = tokens.shape[-1]
    if not length:
        raise UserError("generate needs at least one token to start from, such as the tokenizer's eot_id", EXIT_USAGE)
    if length + max_new_tokens - 1 > context_length:
        raise UserError(
            f"{length} tokens and {max_new_tokens} more exceed the model's context of {context_length}; ask for fewer",
            EXIT_USAGE,
        )
    spec = SamplingSpec(**sampling)  # pyright: ignore[reportArgumentType]
    steps = list(generate(model, prompts, max_new_tokens=max_new_tokens, sampling=spec, seed=seed))
    new = torch.tensor(steps, dtype=tokens.dtype, device=tokens.device).reshape(max_new_tokens, len(prompts))
    return torch.cat([tokens, new.mT.reshape(*tokens.shape[:-1], max_new_tokens)], dim=-1)


@torch.inference_mode()
def _next_logits(
    model: Transformer, tokens: Tensor, *, segments: Tensor | None, positions: Tensor | None, cache: KeyValueCache
) -> Tensor:
    """Logits [batch, vocab_size] after the last token; earlier positions never reach the head.

    Calls `forward` itself, which passes by `torch.compile`: lengths change at every call, and a model that training has
    compiled would be compiled again for each of them.
    """
    return model.forward(tokens, segments=segments, positions=positions, cache=cache, readout=_last_logits)


def _last_logits(hidden: Tensor, head: Head) -> Tensor:
    return head(hidden[:, -1])


def _align_right(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(tokens, segments, positions)`, int64 [batch, longest]: prompts end in the same column, padding stands before.

    Prompts of one length need no padding: segments and positions are None, and attention needs no mask.
    """
    longest = max(len(prompt) for prompt in prompts)
    missing = torch.tensor([longest - len(prompt) for prompt in prompts], device=device).unsqueeze(1)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if not missing.any():
        return tokens, None, None
    columns = torch.arange(longest, device=device)
    segments = torch.where(columns < missing, _PADDING, _TEXT)
    return tokens, segments, (columns - missing).clamp(min=0)


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """bool [batch, vocab_size]: which ids each prompt holds."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen
