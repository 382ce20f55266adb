"""`transformerlm-eval`: how likely a checkpoint finds a text, and how far that is from the truth where it is known."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, TypeAdapter

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import EvalConfig
from config.specs import (
    CheckpointEvaluationSpec,
    EvaluationDataSpec,
    FilesEvaluationDataSpec,
    GrammarEvaluationDataSpec,
    RunEvaluationDataSpec,
    TokensEvaluationDataSpec,
)
from trainkit.data.specs import DataSpec, MegatronDataSpec
from trainkit.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from trainkit.data.megatron import IntArray
    from transformerlm.evaluation.likelihood import Excess, Scores
    from transformerlm.tokenizer.tokenizer import Tokenizer


METHODS = {
    "ar": "exact, token after token",
    "bound": "upper bound over all orders of unmasking, estimated",
    "left_to_right": "exact, masks lifted from left to right",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was scored and what came out."""

    checkpoint: str
    weights: str
    method: str
    """`ar`, `bound` or `left_to_right`: what the loss is."""
    data: str
    documents: int
    tokens: int
    bytes: int
    loss: float
    """Nats per token."""
    loss_error: float
    """Standard error of the loss from the random draws of `bound`; 0 for what is exact."""
    perplexity: float
    bits_per_byte: float
    """NaN for texts without a byte."""
    grammar: GrammarReport | None
    """Only for stories of the grammar."""


@dataclass(frozen=True, kw_only=True)
class GrammarReport:
    """The model beside the grammar that wrote the stories, pair by pair."""

    bits_per_byte: float
    """The grammar's own: no model can do better in the mean."""
    excess: float
    """The model's nats above the grammar's, as a share of the grammar's."""
    excess_nats: float
    """The same in nats per story."""
    standard_error: float
    """Of `excess_nats`, over the stories; NaN for a single one."""

    @property
    def excess_error(self) -> float:
        """The standard error of `excess`, as a share of the grammar's nats too."""
        return abs(self.standard_error * self.excess / self.excess_nats) if self.excess_nats else 0.0


@dataclass(frozen=True)
class _Data:
    """Documents to score."""

    name: str
    documents: Iterable[IntArray]
    """Ids, the end of text included."""
    count: int | None
    """How many, where known."""
    is_grammar: bool


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[EvalConfig], arguments: argparse.Namespace) -> None:
    report = evaluate_checkpoint(loaded.config.evaluation, loaded.config.data)
    if arguments.json:
        print(json.dumps(as_json(report), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(table(report))


def evaluate_checkpoint(spec: CheckpointEvaluationSpec, data: EvaluationDataSpec) -> Report:
    """Score the documents of `data` with a checkpoint."""
    from transformerlm.evaluation.methods import resolve_method, score
    from transformerlm.inference.predictor import Predictor
    from transformerlm.models.files import load_checkpoint
    from transformerlm.utils.dtypes import resolve_dtype

    checkpoint = load_checkpoint(spec.checkpoint, weights=spec.weights, device=spec.device)
    model, tokenizer = checkpoint.model.to(resolve_dtype(spec.precision)), checkpoint.tokenizer
    method = resolve_method(spec.method, checkpoint.reading)
    if spec.stride > model.spec.context_length:
        raise UserError(
            f"evaluation.stride ({spec.stride}) exceeds the model's context of {model.spec.context_length} tokens; "
            "lower it, or set 0 for half the context",
            EXIT_USAGE,
        )
    opened = _open_data(data, tokenizer, checkpoint.path)
    stories: list[str] = []

    def documents() -> Iterator[IntArray]:
        for document in islice(opened.documents, spec.max_documents or None):
            if opened.is_grammar:
                stories.append(tokenizer.decode(document[:-1]))
            yield document

    shown = _with_progress(documents(), _least(opened.count, spec.max_documents))
    bound = score(Predictor(model, tokenizer, checkpoint.reading), shown, spec)
    scores = bound.scores
    if not len(scores.nats):
        raise UserError(f"{opened.name} holds no document to score; check the [data] table")
    return Report(
        checkpoint=str(checkpoint.path),
        weights=spec.weights,
        method=method,
        data=opened.name,
        documents=len(scores.nats),
        tokens=int(scores.tokens.sum()),
        bytes=int(scores.bytes.sum()),
        loss=scores.loss,
        loss_error=bound.standard_error / max(int(scores.tokens.sum()), 1),
        perplexity=scores.perplexity,
        bits_per_byte=scores.bits_per_byte,
        grammar=_beside_the_grammar(scores, stories) if opened.is_grammar else None,
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values: a table that does not apply is left out, a number that is not one is None."""
    from trainkit.run_directory import finite

    content = finite(dataclasses.asdict(report))
    return content if content["grammar"] else {name: value for name, value in content.items() if name != "grammar"}


def table(report: Report) -> str:
    """The report for people."""
    rows = [
        ("checkpoint", f"{report.checkpoint} ({report.weights} weights)"),
        ("data", f"{report.data}: {report.documents:,} documents, {report.tokens:,} tokens, {report.bytes:,} bytes"),
        ("method", METHODS[report.method]),
        ("loss", f"{measured(report.loss, report.loss_error or math.nan, '.4f')} nats per token"),
        ("perplexity", f"{report.perplexity:.3f}"),
        ("bits per byte", f"{report.bits_per_byte:.4f}"),
    ]
    if report.grammar is not None:
        grammar = report.grammar
        rows += [
            ("grammar", f"{grammar.bits_per_byte:.4f} bits per byte: the best that any model can reach"),
            (
                "excess",
                f"{measured(grammar.excess, grammar.excess_error, '.2%')} above it "
                f"({measured(grammar.excess_nats, grammar.standard_error, '.2f')} nats per story)",
            ),
        ]
    return "\n".join(f"{name:<15}{text}" for name, text in rows)


def measured(value: float, standard_error: float, form: str) -> str:
    """The value and, where it is known, its error."""
    return f"{value:{form}} ± {standard_error:{form}}" if math.isfinite(standard_error) else f"{value:{form}}"


def _beside_the_grammar(scores: Scores, stories: Sequence[str]) -> GrammarReport:
    from transformerlm.corpus.stories import log_prob

    nats = [-log_prob(story) for story in stories]
    if math.inf in nats:
        raise UserError(
            f"story {nats.index(math.inf)} is not one of this version's grammar; make the data again, "
            'or score it as text with data.kind = "files"'
        )
    excess: Excess = scores.excess_over(nats)
    return GrammarReport(
        bits_per_byte=sum(nats) / math.log(2) / int(scores.bytes.sum()),
        excess=excess.ratio,
        excess_nats=excess.mean,
        standard_error=excess.standard_error,
    )


# -- data --------------------------------------------------------------------------------------------------------------


def _open_data(data: EvaluationDataSpec, tokenizer: Tokenizer, checkpoint: Path) -> _Data:
    match data:
        case RunEvaluationDataSpec():
            return _open_set_of_run(data.set, checkpoint, tokenizer)
        case TokensEvaluationDataSpec():
            return _open_tokens(data.prefix, tokenizer)
        case FilesEvaluationDataSpec():
            from trainkit.data.documents import iterate_documents

            texts = iterate_documents(data.paths, text_field=data.text_field)
            return _Data(", ".join(data.paths), _encoded(texts, tokenizer), None, is_grammar=False)
        case GrammarEvaluationDataSpec():
            from transformerlm.corpus.stories import sample, split_seed

            seed = split_seed(data.seed, "val")
            texts = (sample(seed, index) for index in range(data.num_stories))
            name = f"held-out stories of the grammar, seed {data.seed}"
            return _Data(name, _encoded(texts, tokenizer), data.num_stories, is_grammar=True)


def _open_tokens(prefix: str, tokenizer: Tokenizer) -> _Data:
    from trainkit.data.megatron import IndexedTokens

    tokens = IndexedTokens.open(prefix)
    tokens.check_vocabulary(tokenizer.vocab_size)
    source: dict[str, Any] = {}
    if tokens.manifest is not None:
        source = tokens.manifest.source
        if tokens.manifest.tokenizer not in ("", tokenizer.content_hash):
            raise UserError(
                f"{prefix} was made with another tokenizer than the checkpoint's; make the files again with "
                "uv run transformerlm-make-data and the tokenizer in the checkpoint's folder"
            )
    documents = (tokens.document(index) for index in range(len(tokens)))
    is_grammar = source.get("corpus", {}).get("kind") == "grammar"
    return _Data(prefix, documents, len(tokens), is_grammar=is_grammar)


def _open_set_of_run(name: str, checkpoint: Path, tokenizer: Tokenizer) -> _Data:
    """What the run that wrote a checkpoint kept from training under this name."""
    from cli.data_sources import megatron_prefix, open_held_out

    data, revision = _data_of_run(checkpoint)
    if isinstance(data, MegatronDataSpec) and (prefix := megatron_prefix(data, name)):
        return _open_tokens(prefix, tokenizer)
    held_out = None if isinstance(data, MegatronDataSpec) else open_held_out(data, name, tokenizer, revision)
    if held_out is None:
        if name == "test":
            is_tokens = isinstance(data, MegatronDataSpec)
            where = "data.megatron_test_prefix" if is_tokens else "data.test_fraction or data.test_split"
            made = " (token files of corpus.test_fraction, test_paths or num_test_stories)" if is_tokens else ""
            raise UserError(
                f"the run of {checkpoint} kept no test set; give the next run one with {where}{made}, or {_OTHER_DATA}"
            )
        named = ", ".join(data.validation_sets) or "no named ones"
        raise UserError(
            f"the run of {checkpoint} has no set {name!r}; data.set is val, test, or one of data.validation_sets "
            f"({named}); or {_OTHER_DATA}"
        )
    return _Data(held_out.about, held_out.documents(0, len(held_out)), len(held_out), is_grammar=False)


_OTHER_DATA = 'name the data with data.kind = "tokens" (and data.prefix), "files" or "grammar"'


def _data_of_run(checkpoint: Path) -> tuple[DataSpec, str]:
    """The `[data]` table of the run that wrote a checkpoint, and the commit of its hub data set."""
    path = checkpoint.parent.parent / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        table: TypeAdapter[DataSpec] = TypeAdapter(Annotated[DataSpec, Discriminator("pipeline_mode")])
        data = table.validate_json(json.dumps(config["data"]))
        return data, str(config.get("inputs", {}).get("revision", ""))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{checkpoint} lies in no run directory that says what it was validated on; {_OTHER_DATA}"
        ) from None


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[IntArray]:
    from cli.validation import encode_document

    return (encode_document(text, tokenizer) for text in texts)


def _least(count: int | None, limit: int) -> int | None:
    return min(count, limit) if count is not None and limit else count or limit or None


def _with_progress(documents: Iterator[IntArray], count: int | None) -> Iterable[IntArray]:
    """The same documents; a terminal shows how far they are."""
    if not sys.stderr.isatty():
        return documents
    from rich.console import Console
    from rich.progress import track

    return track(documents, "scoring", total=count, console=Console(stderr=True), transient=True)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


COMMAND = Command(
    name="transformerlm-eval",
    summary="Score a text with a checkpoint: loss, perplexity, bits per byte, and for stories of the grammar the "
    "distance from the best loss that is possible.",
    schema=EvalConfig,
    default_config="eval",
    run=run,
    examples=(
        "--ckpt runs/quickstart",
        "--config config/resources/eval.toml --ckpt runs/tinystories/checkpoints/latest --json",
        "--ckpt runs/tinystories data.set=test",
        "--ckpt runs/quickstart data.kind=grammar data.num_stories=2000",
        "--ckpt runs/tinystories data.kind=files 'data.paths=[\"val.jsonl\"]'",
    ),
    useful=("evaluation.checkpoint", "evaluation.max_documents", "evaluation.batch_size", "data.kind"),
    flags={"--ckpt": "evaluation.checkpoint", "--checkpoint": "evaluation.checkpoint", "--device": "evaluation.device"},
    add_arguments=_add_arguments,
)


if __name__ == "__main__":
    raise SystemExit(main())
