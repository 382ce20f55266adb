"""One way to ask any model how likely it finds a set of documents."""

from __future__ import annotations

from collections.abc import Iterable

from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.evaluation.diffusion import Bound, IntArray, score_bound, score_left_to_right
from transformerlm.evaluation.likelihood import score_documents
from transformerlm.evaluation.specs import EvaluationSpec, Method
from transformerlm.inference.predictor import Predictor
from transformerlm.models.specs import Reading

REPLICATES = 2
"""Independent estimates of a bound; their difference tells its error."""


def score(predictor: Predictor, documents: Iterable[IntArray], spec: EvaluationSpec, *, seed: int = 0) -> Bound:
    """Score documents (ids, the final end-of-text included); a method that is exact has no standard error.

    `seed` decides a bound's noise; exact methods ignore it.
    """
    model, tokenizer = predictor.model, predictor.tokenizer
    byte_lengths, eot_id, context_length = tokenizer.byte_lengths(), tokenizer.eot_id, model.spec.context_length
    match resolve_method(spec.method, predictor.reading):
        case "ar":
            scores = score_documents(
                model,
                documents,
                byte_lengths,
                eot_id=eot_id,
                context_length=context_length,
                stride=spec.stride,
                batch_size=spec.batch_size,
            )
            return Bound(scores, 0.0)
        case "bound":
            return score_bound(
                predictor.denoiser,
                documents,
                byte_lengths,
                eot_id=eot_id,
                context_length=context_length,
                draws=spec.draws,
                replicates=REPLICATES,
                seed=seed,
                batch_size=spec.batch_size,
            )
        case _:
            scores = score_left_to_right(
                predictor.denoiser,
                documents,
                byte_lengths,
                eot_id=eot_id,
                context_length=context_length,
                batch_size=spec.batch_size,
            )
            return Bound(scores, 0.0)


def resolve_method(method: Method, reading: Reading) -> Method:
    """The method that is meant; `UserError` for one that the model was not trained for."""
    if method == "auto":
        return "ar" if "ar" in reading.modes else "bound"
    needed = "ar" if method == "ar" else "diffusion"
    if needed not in reading.modes:
        raise UserError(
            f'evaluation.method = "{method}" needs a model trained for {needed}, this one was for '
            f'{" and ".join(reading.modes)}; use "auto"',
            EXIT_USAGE,
        )
    return method
