"""Text in, text out: a model, its tokenizer, and how the two meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.generation import generate
from transformerlm.inference.specs import DEFAULT_SAMPLING, PrecisionName, SamplingSpec, WeightsName
from transformerlm.models.files import load_checkpoint
from transformerlm.models.transformer import Transformer
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.dtypes import resolve_device, resolve_dtype


class Predictor:
    """Continues texts.

    `total_length` counts the tokens of prompt and continuation together; 0 is the model's context length. A text that
    the model ends itself is shorter. Special tokens in a prompt are plain characters.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "auto",
        weights: WeightsName = "raw",
        precision: PrecisionName = "fp32",
    ) -> Predictor:
        """From a step folder, a run folder, or `…/checkpoints/best` or `latest`."""
        checkpoint = load_checkpoint(path, weights=weights, device=resolve_device(device))
        return cls(checkpoint.model.to(resolve_dtype(precision)), checkpoint.tokenizer)

    def generate(
        self,
        prompt: str = "",
        *,
        total_length: int = 0,
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        seed: int = 0,
        stop_at_eot: bool = True,
    ) -> str:
        """The continuation, without the prompt."""
        return "".join(
            self.stream(prompt, total_length=total_length, sampling=sampling, seed=seed, stop_at_eot=stop_at_eot)
        )

    def stream(
        self,
        prompt: str = "",
        *,
        total_length: int = 0,
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        seed: int = 0,
        stop_at_eot: bool = True,
    ) -> Iterator[str]:
        """The continuation in pieces, as it arises; a piece never ends inside a character."""
        steps = self._steps([prompt], total_length, sampling, seed, stop_at_eot)
        return self.tokenizer.decode_stream(token for [token] in steps if token is not None)

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        total_length: int = 0,
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        seed: int = 0,
        stop_at_eot: bool = True,
    ) -> list[str]:
        """A continuation of each prompt, all at one time; equal prompts get different random numbers."""
        continuations: list[list[int]] = [[] for _ in prompts]
        for ids in self._steps(prompts, total_length, sampling, seed, stop_at_eot):
            for continuation, token in zip(continuations, ids, strict=True):
                if token is not None:
                    continuation.append(token)
        return [self.tokenizer.decode(continuation) for continuation in continuations]

    def _steps(
        self, prompts: Sequence[str], total_length: int, sampling: SamplingSpec, seed: int, stop_at_eot: bool
    ) -> Iterator[list[int | None]]:
        """The new ids of each step, a final end-of-text left out. Refuses what does not fit before it does anything."""
        encoded = [self.tokenizer.encode(prompt, allowed_special="none").tolist() for prompt in prompts]
        total = self._checked_length(max(map(len, encoded)), total_length)
        eot_id = self.tokenizer.eot_id
        steps = generate(
            self.model,
            [[eot_id, *ids] for ids in encoded],
            max_new_tokens=[total - len(ids) for ids in encoded],
            sampling=sampling,
            seed=seed,
            stop_id=eot_id if stop_at_eot else None,
            banned=self._banned,
        )
        return ([None if stop_at_eot and token == eot_id else token for token in ids] for ids in steps)

    def _checked_length(self, prompt_length: int, total_length: int) -> int:
        context_length = self.model.spec.context_length
        total = total_length or context_length
        if total > context_length:
            raise UserError(
                f"inference.total_length ({total}) exceeds the model's context of {context_length} tokens; "
                "lower it, or set 0 for the whole context",
                EXIT_USAGE,
            )
        if prompt_length >= context_length:
            raise UserError(
                f"the prompt has {prompt_length} tokens and the model's context {context_length}; shorten the prompt",
                EXIT_USAGE,
            )
        if prompt_length >= total:
            raise UserError(
                f"inference.total_length ({total}) must be larger than the prompt's {prompt_length} tokens; "
                "raise it or shorten the prompt",
                EXIT_USAGE,
            )
        return total

    @cached_property
    def _banned(self) -> torch.Tensor:
        """Ids that stand for no text, bool [vocab_size]: special tokens but the end of text, and gaps in the ids."""
        banned = torch.from_numpy(self.tokenizer.byte_lengths() == 0)
        banned[self.tokenizer.eot_id] = False
        return banned
