"""Text in, text out: a model, its tokenizer, and how the two meet."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.denoising import Denoiser
from transformerlm.inference.diffusion import Step, denoise
from transformerlm.inference.generation import generate
from transformerlm.inference.specs import (
    DEFAULT_DENOISING,
    DEFAULT_SAMPLING,
    DenoisingSpec,
    ModeName,
    PrecisionName,
    SamplingSpec,
    WeightsName,
)
from transformerlm.models.files import load_checkpoint
from transformerlm.models.specs import AUTOREGRESSIVE, Mode, Reading
from transformerlm.models.transformer import Transformer
from transformerlm.tokenizer.text_ids import checked_mask_id, ids_without_text
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.utils.dtypes import resolve_device, resolve_dtype


class Predictor:
    """Continues texts, or with a diffusion model fills them in.

    `total_length` counts the tokens of prompt, new text and suffix together; 0 is all that the model's context holds,
    which only a block diffusion model can go beyond. A text that the model ends itself is shorter. Special tokens in a
    prompt are plain characters. `mode` chooses how to write where the model knows both ways; `auto` is the one that it
    was trained for, next tokens when both.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, reading: Reading = AUTOREGRESSIVE) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reading = reading

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
        return cls(checkpoint.model.to(resolve_dtype(precision)), checkpoint.tokenizer, checkpoint.reading)

    def generate(
        self,
        prompt: str = "",
        *,
        suffix: str = "",
        total_length: int = 0,
        mode: ModeName = "auto",
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        denoising: DenoisingSpec = DEFAULT_DENOISING,
        seed: int = 0,
        stop_at_eot: bool = True,
    ) -> str:
        """The new text: after the prompt, and with a `suffix` (diffusion only) between the two."""
        [text] = self.generate_batch(
            [prompt],
            suffix=suffix,
            total_length=total_length,
            mode=mode,
            sampling=sampling,
            denoising=denoising,
            seed=seed,
            stop_at_eot=stop_at_eot,
        )
        return text

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        suffix: str = "",
        total_length: int = 0,
        mode: ModeName = "auto",
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        denoising: DenoisingSpec = DEFAULT_DENOISING,
        seed: int = 0,
        stop_at_eot: bool = True,
    ) -> list[str]:
        """The new text of each prompt, all at one time; equal prompts get different random numbers."""
        if self.resolve_mode(mode) == "diffusion":
            steps = self.denoise(
                prompts,
                suffix=suffix,
                total_length=total_length,
                sampling=sampling,
                denoising=denoising,
                seed=seed,
                stop_at_eot=stop_at_eot,
            )
            *_, last = steps
            return [
                self.new_text(row, prompt, suffix, stop_at_eot=stop_at_eot)
                for row, prompt in zip(last.canvas, prompts, strict=True)
            ]
        self._check_no_suffix(suffix)
        continuations: list[list[int]] = [[] for _ in prompts]
        for ids in self._continuations(prompts, total_length, sampling, seed, stop_at_eot):
            for continuation, token in zip(continuations, ids, strict=True):
                if token is not None:
                    continuation.append(token)
        return [self.tokenizer.decode(continuation) for continuation in continuations]

    def stream(
        self,
        prompt: str = "",
        *,
        total_length: int = 0,
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        seed: int = 0,
        stop_at_eot: bool = True,
    ) -> Iterator[str]:
        """The continuation token by token, in pieces that never end inside a character; for `diffusion`, `denoise`."""
        if "ar" not in self.reading.modes:
            raise UserError("`stream` writes next tokens, and this model was trained for diffusion; use `denoise`")
        steps = self._continuations([prompt], total_length, sampling, seed, stop_at_eot)
        return self.tokenizer.decode_stream(token for [token] in steps if token is not None)

    def denoise(
        self,
        prompts: Sequence[str],
        *,
        suffix: str = "",
        total_length: int = 0,
        sampling: SamplingSpec = DEFAULT_SAMPLING,
        denoising: DenoisingSpec = DEFAULT_DENOISING,
        seed: int = 0,
        stop_at_eot: bool = True,
        judge: Transformer | None = None,
    ) -> Iterator[Step]:
        """Fill a canvas for each prompt, step by step: end of text, prompt, masks, `suffix`.

        `judge` is a next-token model with the same tokenizer, whose agreement `denoising` may ask for instead of this
        model's own. The canvas of a block model may be longer than its context, where there is no suffix.
        """
        denoiser = self.denoiser
        self._check_denoising(prompts, denoising)
        end = self._encode(suffix)
        starts = [[self.tokenizer.eot_id, *self._encode(prompt)] for prompt in prompts]
        longest, what = max(map(len, starts)) - 1 + len(end), "prompt and suffix" if suffix else "prompt"
        # The end-of-text token that begins the document has a place of its own on the canvas.
        room = self.model.spec.context_length - 1
        goes_on = total_length > room and 0 < 2 * denoiser.block_size <= room + 1 and not suffix
        length = 1 + self._checked_length(longest, total_length, sys.maxsize if goes_on else room, what)
        rows = [[*start, *[denoiser.mask_id] * (length - len(start) - len(end)), *end] for start in starts]
        return denoise(
            denoiser,
            torch.tensor(rows, device=self.model.embedding.weight.device),
            denoising=denoising,
            sampling=sampling,
            seed=seed,
            stop_id=self.tokenizer.eot_id if stop_at_eot else None,
            judge=self._judge(judge, min(length, room + 1)) if denoising.agreement else None,
        )

    def new_text(self, canvas: Tensor, prompt: str, suffix: str = "", *, stop_at_eot: bool = True) -> str:
        """What stands on a filled canvas [length] between prompt and suffix, up to where the text ends, if it does."""
        ids = canvas.tolist()[1 + len(self._encode(prompt)) :]
        ids = ids[: len(ids) - len(self._encode(suffix))]
        end = ids.index(self.tokenizer.eot_id) if stop_at_eot and self.tokenizer.eot_id in ids else len(ids)
        return self.tokenizer.decode(ids[:end])

    def resolve_mode(self, mode: ModeName) -> Mode:
        """The mode that is meant; `UserError` for one that the model was not trained for."""
        modes = self.reading.modes
        if mode == "auto":
            return modes[0]
        if mode not in modes:
            raise UserError(
                f'inference.mode = "{mode}", but this checkpoint was trained for {" and ".join(modes)}; '
                'use that, or "auto"',
                EXIT_USAGE,
            )
        return mode

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model as a diffusion model; `UserError` if it is none."""
        self.resolve_mode("diffusion")
        return Denoiser(
            self.model,
            checked_mask_id(self.tokenizer),
            self._without_text.to(self.model.embedding.weight.device),
            self.reading.alignment,
            self.reading.block_size,
        )

    def _continuations(
        self, prompts: Sequence[str], total_length: int, sampling: SamplingSpec, seed: int, stop_at_eot: bool
    ) -> Iterator[list[int | None]]:
        """The new ids of each step, a final end-of-text left out. Refuses what does not fit before it does anything."""
        encoded = [self._encode(prompt) for prompt in prompts]
        total = self._checked_length(max(map(len, encoded)), total_length, self.model.spec.context_length)
        eot_id = self.tokenizer.eot_id
        steps = generate(
            self.model,
            [[eot_id, *ids] for ids in encoded],
            max_new_tokens=[total - len(ids) for ids in encoded],
            sampling=sampling,
            seed=seed,
            stop_id=eot_id if stop_at_eot else None,
            banned=self._without_text,
        )
        return ([None if stop_at_eot and token == eot_id else token for token in ids] for ids in steps)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allowed_special="none").tolist()

    def _checked_length(self, given: int, total_length: int, room: int, what: str = "prompt") -> int:
        total, context_length = total_length or room, self.model.spec.context_length
        context = f"context of {context_length} tokens" + (", one of which begins it" if room < context_length else "")
        if total > room:
            raise UserError(
                f"inference.total_length ({total}) exceeds the model's {context}; "
                f"set at most {room}, or 0 for all of it",
                EXIT_USAGE,
            )
        if given >= room:
            raise UserError(f"{given} tokens of {what} fill the model's {context}; shorten the {what}", EXIT_USAGE)
        if given >= total:
            raise UserError(
                f"inference.total_length ({total}) must be larger than the {given} tokens of {what}; "
                f"raise it or shorten the {what}",
                EXIT_USAGE,
            )
        return total

    def _check_no_suffix(self, suffix: str) -> None:
        if suffix:
            advice = "set inference.mode = diffusion" if "diffusion" in self.reading.modes else "leave it out"
            raise UserError(
                f"inference.suffix is for diffusion: next-token prediction cannot look ahead; {advice}", EXIT_USAGE
            )

    def _judge(self, judge: Transformer | None, length: int) -> Transformer:
        """Who is asked to agree on drafts of `length` tokens: `judge`, or this model itself where it can."""
        if judge is None and "ar" not in self.reading.modes:
            raise UserError(
                "inference.agreement asks for next-token probabilities, and this checkpoint was trained for diffusion "
                "only; use one that was trained for both, or set agreement = 0",
                EXIT_USAGE,
            )
        judge = judge or self.model
        if judge.vocab_size != self.model.vocab_size or judge.spec.context_length < length:
            raise UserError(
                f"the model that is to agree has {judge.vocab_size} ids and a context of {judge.spec.context_length}; "
                f"it needs {self.model.vocab_size} ids and {length} tokens: use another one, or a shorter total_length",
                EXIT_USAGE,
            )
        return judge

    def _check_denoising(self, prompts: Sequence[str], denoising: DenoisingSpec) -> None:
        if denoising.guidance and not all(prompts):
            raise UserError(
                "inference.guidance strengthens the prompt, and the prompt is empty; give one, or set guidance = 0",
                EXIT_USAGE,
            )
        own = self.reading.block_size
        if own and denoising.block_length not in (0, own):
            raise UserError(
                f"inference.block_length = {denoising.block_length}, but this model was trained in blocks of {own}; "
                "set 0 for the model's own",
                EXIT_USAGE,
            )

    @cached_property
    def _without_text(self) -> Tensor:
        return torch.from_numpy(ids_without_text(self.tokenizer))
