"""The schema of each command: which tables its configuration has, and what must hold between them.

A table is a spec of one of the packages, nested as it is; what only makes sense for a whole run is declared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel, ConfigDict, Discriminator, StringConstraints, model_validator

from trainkit.data.specs import MegatronDataSpec
from trainkit.specs import (
    AdamWSpec,
    CheckpointSpec,
    CosineScheduleSpec,
    LoggingSpec,
    OptimizerSpec,
    ScheduleSpec,
    TrainingSpec,
)
from transformerlm.evaluation.specs import EvaluationSpec
from transformerlm.inference.specs import InferenceSpec, PrecisionName, SamplingSpec, WeightsName
from transformerlm.models.specs import TransformerSpec
from transformerlm.objectives.specs import AutoregressiveSpec
from transformerlm.tokenizer.specs import TokenizerTrainingSpec

FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$")]
TokenType = Literal["auto", "uint16", "int32"]
NotEmpty = Annotated[str, StringConstraints(min_length=1)]


class Schema(BaseModel):
    """What all schemas share. Built on first use (`defer_build`): a command pays for its own schema only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


# -- tables of a training run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Which run this is."""

    name: FileName = "run"
    """Name of the run and of its folder; unless set, the name of the configuration file without `.toml`."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1337
    """Every random number of the run follows from this one."""
    dir: NotEmpty = "runs"
    """Folder of all runs; this one writes into `dir/name`."""


@dataclass(frozen=True, kw_only=True)
class RunTrainingSpec(TrainingSpec):
    """The loop, and what it trains for."""

    objective: Literal["ar"] = "ar"
    """`ar`: predict each token from those before it. Chooses the kind of the table `[objective]`."""


@dataclass(frozen=True, kw_only=True)
class SamplesSpec(SamplingSpec):
    """The texts that a run writes into `samples.md` while it trains and at its end."""

    prompts: tuple[str, ...] = ("Once upon a time",)
    """Texts to continue, one sample each; an empty text starts a new document."""
    total_length: Annotated[int, Ge(0)] = 0
    """Tokens of prompt and continuation together, at most the model's context length; 0 = that length."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFilesSpec:
    """A trained tokenizer."""

    path: NotEmpty
    """Folder of the tokenizer, as `transformerlm-train-tokenizer` writes it."""


class Experiment(Schema):
    """What training and the pipeline have in common."""

    run: RunSpec = RunSpec()
    """Which run this is."""
    model: TransformerSpec = TransformerSpec()
    """What the model is. `depth = N` is short for `num_layers = N`, `d_model = 64·N` and heads of 64 channels."""
    data: MegatronDataSpec = MegatronDataSpec()
    """What it reads."""
    training: RunTrainingSpec = RunTrainingSpec()
    """The loop: how long, how large a step, how often to look, and for which objective."""
    objective: AutoregressiveSpec = AutoregressiveSpec()
    """Settings of the objective that `training.objective` chooses."""
    optimizer: Annotated[OptimizerSpec, Discriminator("kind")] = AdamWSpec()
    """How weights follow gradients."""
    schedule: Annotated[ScheduleSpec, Discriminator("kind")] = CosineScheduleSpec()
    """How the learning rate moves over the run."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Which checkpoints are kept."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """How the validation loss is measured."""
    logging: LoggingSpec = LoggingSpec()
    """Where records go."""
    inference: SamplesSpec = SamplesSpec()
    """The samples that the run writes."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        length = self.model.context_length
        if self.training.total_batch_size % length:
            multiple = max(1, round(self.training.total_batch_size / length)) * length
            raise ValueError(
                f"training.total_batch_size ({self.training.total_batch_size}) must be a multiple of "
                f"model.context_length ({length}), for instance {multiple}"
            )
        if self.inference.total_length > length:
            raise ValueError(
                f"inference.total_length ({self.inference.total_length}) must be at most "
                f"model.context_length ({length})"
            )
        if self.evaluation.stride > length:
            raise ValueError(
                f"evaluation.stride ({self.evaluation.stride}) must be at most model.context_length ({length})"
            )
        if self.objective.kind != self.training.objective:
            raise ValueError(
                f"objective.kind ({self.objective.kind!r}) must be training.objective ({self.training.objective!r}): "
                "set only the latter"
            )
        return self


class TrainConfig(Experiment):
    """`transformerlm-train`: a model from a tokenizer and token files."""

    tokenizer: TokenizerFilesSpec
    """The tokenizer that made the token files."""

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not (self.data.megatron_train_prefix or self.data.blend_prefixes):
            raise ValueError(
                "data.megatron_train_prefix is required: the path of token files without .bin/.idx, "
                "which transformerlm-make-data writes (or data.blend_prefixes, for several)"
            )
        return self


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GrammarCorpusSpec:
    """Stories of the project's own grammar, made on the spot: text whose exact probability is known."""

    kind: Literal["grammar"] = "grammar"
    num_train_stories: Annotated[int, Ge(1)] = 20_000
    """Stories to train on."""
    num_val_stories: Annotated[int, Ge(0)] = 500
    """Stories held out for validation; none of them is trained on."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Which stories: the same seed tells the same ones."""


@dataclass(frozen=True, kw_only=True)
class FilesCorpusSpec:
    """Text files of your own: `.jsonl` (a document per row) or `.txt` (documents between `<|endoftext|>` lines)."""

    kind: Literal["files"] = "files"
    train_paths: tuple[NotEmpty, ...]
    """Files to train on."""
    val_paths: tuple[NotEmpty, ...] = ()
    """Files to validate on."""
    text_field: NotEmpty = "text"
    """Field of a row that holds its text."""
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the training documents held out for validation, for when there are no `val_paths`."""
    max_train_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many training documents; 0 = all."""
    max_val_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many validation documents; 0 = all."""


@dataclass(frozen=True, kw_only=True)
class HubCorpusSpec:
    """A data set of the Hugging Face hub, or anything else that `datasets.load_dataset` opens."""

    kind: Literal["hub"] = "hub"
    dataset_name: NotEmpty
    """Name of the data set, as in `roneneldan/TinyStories`."""
    train_split: NotEmpty = "train"
    """Split to train on."""
    val_split: str = "validation"
    """Split to validate on; empty = none."""
    text_field: NotEmpty = "text"
    """Column that holds the text."""
    cache_dir: str = ""
    """Folder that keeps the whole data set, to be read again without network; empty streams it and keeps nothing."""
    max_train_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many training documents; 0 = all."""
    max_val_documents: Annotated[int, Ge(0)] = 0
    """Read only the first so many validation documents; 0 = all."""


CorpusSpec = GrammarCorpusSpec | FilesCorpusSpec | HubCorpusSpec
Corpus = Annotated[CorpusSpec, Discriminator("kind")]


# -- tokenizer and token files -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenizerOutputSpec:
    """Where the tokenizer goes."""

    dir: NotEmpty = "data/tokenizer"
    """Folder to write: it appears whole or not at all."""


class TrainTokenizerConfig(Schema):
    """`transformerlm-train-tokenizer`: a byte-level BPE tokenizer from text. Only the training split is read."""

    corpus: Corpus = GrammarCorpusSpec()
    """The text."""
    tokenizer: TokenizerTrainingSpec = TokenizerTrainingSpec()
    """The vocabulary."""
    output: TokenizerOutputSpec = TokenizerOutputSpec()
    """Where the tokenizer goes."""


@dataclass(frozen=True, kw_only=True)
class TokenizerBenchmarkSpec:
    """What is measured, and on which texts."""

    files: tuple[str, ...] = ()
    """Text files, each a corpus of its own."""
    grammar: bool = True
    """Stories of the project's own grammar, up to 4 MB, too: few words that often return."""
    machine: bool = True
    """Sources and documentation of installed packages, too: many words."""
    megabytes: Annotated[float, Gt(0)] = 5.0
    """How much of each corpus to take, in millions of characters."""
    tokenizer: str = ""
    """Folder of the tokenizer to measure; empty = train one on the corpora."""
    vocab_size: Annotated[int, Ge(257)] = 8192
    """Number of ids when training."""
    repeats: Annotated[int, Ge(1)] = 3
    """Rounds of encoding and decoding; medians are reported."""
    training_repeats: Annotated[int, Ge(1)] = 1
    """Rounds of training."""
    memory: bool = True
    """Measure the memory of training, too."""


class BenchTokenizerConfig(Schema):
    """`transformerlm-bench-tokenizer`: the tokenizer beside every installed peer."""

    benchmark: TokenizerBenchmarkSpec = TokenizerBenchmarkSpec()
    """What is measured, and on which texts."""


@dataclass(frozen=True, kw_only=True)
class TokensOutputSpec:
    """Where the token files go."""

    train_prefix: NotEmpty = "data/train"
    """Path of the training files without `.bin`/`.idx`."""
    val_prefix: str = "data/val"
    """Path of the validation files without `.bin`/`.idx`; empty = write none."""
    dtype: TokenType = "auto"
    """Type of a stored token; `auto` takes the smallest that holds the vocabulary."""


class MakeDataConfig(Schema):
    """`transformerlm-make-data`: token files from text and a tokenizer."""

    corpus: Corpus = GrammarCorpusSpec()
    """The text."""
    tokenizer: TokenizerFilesSpec
    """The tokenizer to encode it with."""
    output: TokensOutputSpec = TokensOutputSpec()
    """Where the token files go."""


# -- pipeline ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PipelineTokenizerSpec(TokenizerTrainingSpec):
    """A tokenizer to train, or one that exists."""

    path: str = ""
    """Folder of a tokenizer to use as it is; empty trains one with the other settings."""


@dataclass(frozen=True, kw_only=True)
class ArtifactsSpec:
    """What the pipeline makes before it trains, and reuses while it matches the configuration and its inputs."""

    dir: NotEmpty = "artifacts"
    """Folder of the tokenizer and the token files."""
    dtype: TokenType = "auto"
    """Type of a stored token; `auto` takes the smallest that holds the vocabulary."""


class PipelineConfig(Experiment):
    """`transformerlm-pipeline`: from text to a trained model and its stories in one command."""

    corpus: Corpus = GrammarCorpusSpec()
    """The text."""
    tokenizer: PipelineTokenizerSpec = PipelineTokenizerSpec()
    """The vocabulary."""
    artifacts: ArtifactsSpec = ArtifactsSpec()
    """Where the tokenizer and the token files go."""

    @model_validator(mode="after")
    def _makes_its_data(self) -> Self:
        if self.data.megatron_train_prefix or self.data.megatron_val_prefix or self.data.blend_prefixes:
            raise ValueError(
                "data.megatron_train_prefix, data.megatron_val_prefix and data.blend_prefixes are the pipeline's to "
                "set: leave them out, or run transformerlm-train on files that exist"
            )
        return self

    def train_config(self, *, tokenizer_path: str, train_prefix: str, val_prefix: str) -> TrainConfig:
        """The configuration that `transformerlm-train` runs on what the pipeline has made."""
        shared = {name: getattr(self, name) for name in Experiment.model_fields if name != "data"}
        data = replace(self.data, megatron_train_prefix=train_prefix, megatron_val_prefix=val_prefix)
        return TrainConfig(**shared, data=data, tokenizer=TokenizerFilesSpec(path=tokenizer_path))


# -- inference and evaluation ------------------------------------------------------------------------------------------


class InferConfig(Schema):
    """`transformerlm-infer`: text from a checkpoint."""

    inference: InferenceSpec
    """What to generate, and how."""

    @model_validator(mode="after")
    def _has_a_checkpoint(self) -> Self:
        if not self.inference.checkpoint:
            raise ValueError("inference.checkpoint is required: a run folder, or one of its checkpoints")
        return self


@dataclass(frozen=True, kw_only=True)
class CheckpointEvaluationSpec(EvaluationSpec):
    """Which model to score, and how."""

    checkpoint: NotEmpty
    """A checkpoint: its step folder, its run folder, or `…/checkpoints/best` or `latest`."""
    weights: WeightsName = "raw"
    """`raw`: the trained weights; `ema`: their running average, where the run kept one."""
    device: str = "auto"
    """`auto` takes CUDA where it exists, else the CPU; or a device name such as `cpu`, `cuda`, `cuda:1`, `mps`."""
    precision: PrecisionName = "fp32"
    """Type of weights and arithmetic; sums of log-probabilities are always in 64-bit floats."""


@dataclass(frozen=True, kw_only=True)
class RunEvaluationDataSpec:
    """The validation files of the run that made the checkpoint."""

    kind: Literal["run"] = "run"


@dataclass(frozen=True, kw_only=True)
class TokensEvaluationDataSpec:
    """Token files."""

    kind: Literal["tokens"] = "tokens"
    prefix: NotEmpty
    """Path of the files without `.bin`/`.idx`; the tokenizer must be the checkpoint's."""


@dataclass(frozen=True, kw_only=True)
class FilesEvaluationDataSpec:
    """Text files."""

    kind: Literal["files"] = "files"
    paths: tuple[NotEmpty, ...]
    """`.jsonl` (a document per row) or `.txt` (documents between `<|endoftext|>` lines)."""
    text_field: NotEmpty = "text"
    """Field of a row that holds its text."""


@dataclass(frozen=True, kw_only=True)
class GrammarEvaluationDataSpec:
    """Held-out stories of the grammar: the model's loss beside the grammar's own, and their difference."""

    kind: Literal["grammar"] = "grammar"
    num_stories: Annotated[int, Ge(1)] = 500
    """How many stories to score."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the corpus: the one that the model was trained with, so that the stories are held out."""


EvaluationDataSpec = (
    RunEvaluationDataSpec | TokensEvaluationDataSpec | FilesEvaluationDataSpec | GrammarEvaluationDataSpec
)


class EvalConfig(Schema):
    """`transformerlm-eval`: loss, perplexity and bits per byte of a checkpoint."""

    evaluation: CheckpointEvaluationSpec
    """Which model to score, and how."""
    data: Annotated[EvaluationDataSpec, Discriminator("kind")] = RunEvaluationDataSpec()
    """What to score it on."""


COMMANDS: Mapping[str, type[Schema]] = {
    "transformerlm-train": TrainConfig,
    "transformerlm-pipeline": PipelineConfig,
    "transformerlm-train-tokenizer": TrainTokenizerConfig,
    "transformerlm-make-data": MakeDataConfig,
    "transformerlm-bench-tokenizer": BenchTokenizerConfig,
    "transformerlm-infer": InferConfig,
    "transformerlm-eval": EvalConfig,
}
"""Which schema each command reads."""
