"""From logits to token ids: pure functions on float tensors [batch, vocab_size].

Tokens are drawn in 64-bit floats. One uniform number per row selects the token by inverting the cumulative
distribution; it depends on seed, text and place alone, so that a row does not depend on its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainkit.random import Purpose, uniform
from transformerlm.inference.specs import SamplingSpec


def random_numbers(seed: int, rows: Tensor, length: int) -> Tensor:
    """The numbers in [0, 1) that select the tokens of texts: float64 [batch, length], a column for each new token.

    `rows` int64 [batch] names the texts. All at one time, because a draw costs about as much as a small model's layer.
    """
    return uniform(seed, Purpose.SAMPLING, rows, length)


def sample_tokens(logits: Tensor, spec: SamplingSpec, numbers: Tensor, *, seen: Tensor | None = None) -> Tensor:
    """Ids int64 [batch], selected by `numbers` (float64 [batch], in [0, 1)); `seen` as in `penalize_repetition`."""
    log_probs = adjusted_log_probs(logits.double(), spec, seen=seen)
    if spec.temperature == 0:
        return log_probs.argmax(dim=-1)
    return invert_cumulative(log_probs.exp(), numbers.unsqueeze(-1))


def adjusted_log_probs(logits: Tensor, spec: SamplingSpec, *, seen: Tensor | None = None) -> Tensor:
    """The distribution that `spec` samples from: log-probabilities, −∞ for what is cut off; in the type of `logits`.

    In order: repetition penalty, temperature, top-k, top-p, min-p; each sees what the one before has left.
    """
    if spec.repetition_penalty != 1.0 and seen is not None:
        logits = penalize_repetition(logits, seen, spec.repetition_penalty)
    if spec.temperature == 0:
        return logits.log_softmax(dim=-1)
    logits = logits / spec.temperature
    if spec.top_k:
        logits = keep_top_k(logits, spec.top_k)
    if spec.top_p < 1.0:
        logits = keep_top_p(logits, spec.top_p)
    if spec.min_p > 0.0:
        logits = keep_min_p(logits, spec.min_p)
    return logits.log_softmax(dim=-1)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids that `seen` (bool [batch, vocab_size]) marks less likely (arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """−∞ below the k-th largest logit of a row; ids that tie with it stay."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """−∞ outside the smallest set of most likely ids whose probabilities sum to at least p; lower ids win ties."""
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """−∞ where an id is less likely than p times the most likely one."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def invert_cumulative(probs: Tensor, numbers: Tensor) -> Tensor:
    """The id whose part of the cumulative distribution holds each row's number in [0, 1): int64 [batch].

    `probs` float64 [batch, vocab_size] need not sum to one; ids of probability zero are never taken. A number has at
    most 53 bits, so that its product with the total is rounded to less than the total.
    """
    cumulative = probs.cumsum(dim=-1)
    return torch.searchsorted(cumulative, numbers * cumulative[..., -1:], right=True).squeeze(-1)
