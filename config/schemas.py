"""The schema of each command: which tables its configuration has, and what must hold between them.

A table is a spec, nested as it is: of one of the packages, or of `config.specs` and `config.corpora`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Discriminator, model_validator

from config.corpora import Corpus, GrammarCorpusSpec
from config.specs import (
    ArtifactsSpec,
    CheckpointEvaluationSpec,
    ComparedRunsSpec,
    EvaluationDataSpec,
    InferenceBenchmarkSpec,
    PipelineTokenizerSpec,
    ReplaySpec,
    RunEvaluationDataSpec,
    RunSpec,
    RunTrainingSpec,
    SamplesSpec,
    TokenizerBenchmarkSpec,
    TokenizerFilesSpec,
    TokenizerOutputSpec,
    TokensOutputSpec,
)
from profiling.specs import ProfilingSpec
from trainkit.data.specs import DataSpec, MegatronDataSpec, StreamDataSpec
from trainkit.specs import (
    AdamWSpec,
    CheckpointSpec,
    CosineScheduleSpec,
    DistributedSpec,
    LoggingSpec,
    OptimizerSpec,
    ScheduleSpec,
)
from transformerlm.evaluation.specs import EvaluationSpec
from transformerlm.inference.specs import InferenceSpec
from transformerlm.models.specs import TransformerSpec
from transformerlm.objectives.specs import AutoregressiveSpec, DiffusionSpec, ObjectiveSpec
from transformerlm.tokenizer.specs import TokenizerTrainingSpec

RESERVED_SETS = ("val", "test")
"""What `transformerlm-eval` calls the sets of a run that have no name of their own."""
SET_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Schema(BaseModel):
    """What all schemas share. Built on first use (`defer_build`): a command pays for its own schema only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


# -- tables of a training run ------------------------------------------------------------------------------------------


class Experiment(Schema):
    """What training and the pipeline have in common."""

    run: RunSpec = RunSpec()
    """Which run this is."""
    model: TransformerSpec = TransformerSpec()
    """What the model is. `depth = N` is short for `num_layers = N`, `d_model = 64·N` and heads of 64 channels."""
    data: Annotated[DataSpec, Discriminator("pipeline_mode")] = MegatronDataSpec()
    """What it reads, and how."""
    training: RunTrainingSpec = RunTrainingSpec()
    """The loop: how long, how large a step, how often to look, and for which objective."""
    objective: Annotated[ObjectiveSpec, Discriminator("kind")] = AutoregressiveSpec()
    """Settings of the objective that `training.objective` chooses."""
    optimizer: Annotated[OptimizerSpec, Discriminator("kind")] = AdamWSpec()
    """How weights follow gradients."""
    schedule: Annotated[ScheduleSpec, Discriminator("kind")] = CosineScheduleSpec()
    """How the learning rate moves over the run."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Which checkpoints are kept, where, and from which one the run begins."""
    distributed: DistributedSpec = DistributedSpec()
    """How several processes train one model."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """How the validation loss is measured."""
    logging: LoggingSpec = LoggingSpec()
    """Where records go."""
    inference: SamplesSpec = SamplesSpec()
    """The samples that the run writes."""
    profiling: ProfilingSpec = ProfilingSpec()
    """Where time and memory go."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        length = self.model.context_length
        if self.training.total_batch_size % length:
            multiple = max(1, round(self.training.total_batch_size / length)) * length
            raise ValueError(
                f"training.total_batch_size ({self.training.total_batch_size}) must be a multiple of "
                f"model.context_length ({length}), for instance {multiple}"
            )
        for _, divisor in self.training.context_length_divisors:
            if length % divisor:
                raise ValueError(
                    f"training.context_length_divisors has {divisor}, which does not divide model.context_length "
                    f"({length}); choose divisors of it"
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
        if isinstance(self.objective, DiffusionSpec) and self.objective.block_size > length:
            raise ValueError(
                f"objective.block_size ({self.objective.block_size}) must be at most model.context_length ({length})"
            )
        if self.objective.kind != self.training.objective:
            raise ValueError(
                f"objective.kind ({self.objective.kind!r}) must be training.objective ({self.training.objective!r}): "
                "set only the latter"
            )
        if self.distributed.reduction == "tree" and not self.training.device_batch_size:
            raise ValueError(
                'training.device_batch_size = 0 does not go with distributed.reduction = "tree", where the number '
                "decides about bits: choose one"
            )
        for name in self.data.validation_sets:
            if name in RESERVED_SETS or not SET_NAME.fullmatch(name):
                raise ValueError(
                    f"data.validation_sets has a set named {name!r}: choose another name of letters, digits, _ and -"
                )
        if isinstance(self.data, StreamDataSpec):
            self._check_stream(self.data)
        return self

    def _check_stream(self, data: StreamDataSpec) -> None:
        if not data.dataset_name:
            raise ValueError(
                "data.dataset_name is required: a data set of the Hugging Face hub, or the path of a local file or "
                "folder of text"
            )
        samples = self.training.total_batch_size // self.model.context_length
        if samples % data.lanes:
            raise ValueError(
                f"training.total_batch_size / model.context_length is {samples} windows a step, which must be a "
                f"multiple of data.lanes ({data.lanes}): choose another training.total_batch_size or data.lanes"
            )


class TrainConfig(Experiment):
    """`transformerlm-train`: a model from a tokenizer and token files, or from text."""

    tokenizer: TokenizerFilesSpec
    """The tokenizer: the one that made the token files, or the one to encode the text with."""

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        data = self.data
        if isinstance(data, MegatronDataSpec) and not (data.megatron_train_prefix or data.blend_prefixes):
            raise ValueError(
                "data.megatron_train_prefix is required: the path of token files without .bin/.idx, "
                "which transformerlm-make-data writes (or data.blend_prefixes, for several)"
            )
        return self


# -- tokenizer and token files -----------------------------------------------------------------------------------------


class TrainTokenizerConfig(Schema):
    """`transformerlm-train-tokenizer`: a byte-level BPE tokenizer from text. Only the training split is read."""

    corpus: Corpus = GrammarCorpusSpec()
    """The text."""
    tokenizer: TokenizerTrainingSpec = TokenizerTrainingSpec()
    """The vocabulary."""
    output: TokenizerOutputSpec = TokenizerOutputSpec()
    """Where the tokenizer goes."""


class BenchTokenizerConfig(Schema):
    """`transformerlm-bench-tokenizer`: the tokenizer beside every installed peer."""

    benchmark: TokenizerBenchmarkSpec = TokenizerBenchmarkSpec()
    """What is measured, and on which texts."""


class MakeDataConfig(Schema):
    """`transformerlm-make-data`: token files from text and a tokenizer."""

    corpus: Corpus = GrammarCorpusSpec()
    """The text."""
    tokenizer: TokenizerFilesSpec
    """The tokenizer to encode it with."""
    output: TokensOutputSpec = TokensOutputSpec()
    """Where the token files go."""


# -- pipeline ----------------------------------------------------------------------------------------------------------


class PipelineConfig(Experiment):
    """`transformerlm-pipeline`: from text to a trained model and its stories in one command."""

    corpus: Corpus = GrammarCorpusSpec()
    """The text."""
    tokenizer: PipelineTokenizerSpec = PipelineTokenizerSpec()
    """The vocabulary."""
    artifacts: ArtifactsSpec = ArtifactsSpec()
    """Where the tokenizer and the token files go."""
    data: MegatronDataSpec = MegatronDataSpec()  # pyright: ignore[reportIncompatibleVariableOverride] (it is frozen)
    """How the token files are read."""

    @model_validator(mode="after")
    def _makes_its_data(self) -> Self:
        made = ("megatron_train_prefix", "megatron_val_prefix", "megatron_test_prefix", "blend_prefixes")
        if given := [f"data.{name}" for name in made if getattr(self.data, name)]:
            raise ValueError(
                f"{' and '.join(given)}: the pipeline makes its token files, and knows where they are; "
                "leave this out, or run transformerlm-train on files that exist"
            )
        return self

    def train_config(
        self, *, tokenizer_path: str, train_prefix: str, val_prefix: str = "", test_prefix: str = ""
    ) -> TrainConfig:
        """The configuration that `transformerlm-train` runs on what the pipeline has made."""
        shared = {name: getattr(self, name) for name in Experiment.model_fields if name != "data"}
        data = replace(
            self.data,
            megatron_train_prefix=train_prefix,
            megatron_val_prefix=val_prefix,
            megatron_test_prefix=test_prefix,
        )
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


class BenchInferConfig(Schema):
    """`transformerlm-bench-infer`: next-token decoding beside diffusion."""

    benchmark: InferenceBenchmarkSpec = InferenceBenchmarkSpec()
    """Which weights write which texts, and how."""
    model: TransformerSpec = TransformerSpec()
    """What random weights are made for, where `benchmark.checkpoint` is empty."""


class EvalConfig(Schema):
    """`transformerlm-eval`: loss, perplexity and bits per byte of a checkpoint."""

    evaluation: CheckpointEvaluationSpec
    """Which model to score, and how."""
    data: Annotated[EvaluationDataSpec, Discriminator("kind")] = RunEvaluationDataSpec()
    """What to score it on."""


# -- what a run has left behind ----------------------------------------------------------------------------------------


class ReplayConfig(Schema):
    """`transformerlm-replay`: a past step of a run once more."""

    replay: ReplaySpec
    """Which step, and what to show of it."""


class DiffRunsConfig(Schema):
    """`transformerlm-diff-runs`: where two runs begin to differ."""

    runs: ComparedRunsSpec = ComparedRunsSpec()
    """Which ones."""


COMMANDS: Mapping[str, type[Schema]] = {
    "transformerlm-train": TrainConfig,
    "transformerlm-pipeline": PipelineConfig,
    "transformerlm-train-tokenizer": TrainTokenizerConfig,
    "transformerlm-make-data": MakeDataConfig,
    "transformerlm-bench-tokenizer": BenchTokenizerConfig,
    "transformerlm-infer": InferConfig,
    "transformerlm-bench-infer": BenchInferConfig,
    "transformerlm-eval": EvalConfig,
    "transformerlm-replay": ReplayConfig,
    "transformerlm-diff-runs": DiffRunsConfig,
}
"""Which schema each command reads."""
