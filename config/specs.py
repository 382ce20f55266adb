"""Tables that only make sense for a whole command, and so belong to neither package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import StringConstraints

from config.corpora import NotEmpty
from trainkit.specs import TrainingSpec
from transformerlm.evaluation.specs import EvaluationSpec
from transformerlm.inference.specs import DenoisingSpec, PrecisionName, SamplingSpec, WeightsName
from transformerlm.tokenizer.specs import TokenizerTrainingSpec

FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$")]
TokenType = Literal["auto", "uint16", "int32"]

# -- a training run


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

    objective: Literal["ar", "diffusion", "dual"] = "ar"
    """`ar`: predict each token from those before it; `diffusion`: restore masked tokens from all others; `dual`: both,
    in one model. Chooses the kind of the table `[objective]`."""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """`blocks`: keep only what goes from block to block, and compute the rest again in the backward pass. Takes much
    less memory and about a third more arithmetic; not a bit of the result changes."""


@dataclass(frozen=True, kw_only=True)
class SamplesSpec(SamplingSpec, DenoisingSpec):
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


# -- results


@dataclass(frozen=True, kw_only=True)
class TokenizerOutputSpec:
    """Where the tokenizer goes."""

    dir: NotEmpty = "data/tokenizer"
    """Folder to write: it appears whole or not at all."""


@dataclass(frozen=True, kw_only=True)
class TokensOutputSpec:
    """Where the token files go."""

    train_prefix: NotEmpty = "data/train"
    """Path of the training files without `.bin`/`.idx`."""
    val_prefix: str = "data/val"
    """Path of the validation files without `.bin`/`.idx`; empty = write none."""
    test_prefix: str = "data/test"
    """Path of the test files without `.bin`/`.idx`, for a corpus that has a test split; empty = write none."""
    dtype: TokenType = "auto"
    """Type of a stored token; `auto` takes the smallest that holds the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class PipelineTokenizerSpec(TokenizerTrainingSpec):
    """A tokenizer to train, or one that exists."""

    path: str = ""
    """Folder of a tokenizer to use as it is; empty trains one with the other settings."""


@dataclass(frozen=True, kw_only=True)
class ArtifactsSpec:
    """What the pipeline makes before it trains, and reuses while it matches the configuration and its inputs."""

    dir: NotEmpty = "artifacts"
    """Folder of `train.toml`, the configuration that `transformerlm-train` runs, and of what has no folder of its own
    here: the tokenizer and the token files."""
    tokenizer_dir: str = ""
    """Folder of a tokenizer that several runs share: one that is there is used as it is, else it is trained; empty =
    `tokenizer` in `dir`, trained again whenever the text or the settings change."""
    tokens_dir: str = ""
    """Folder of token files that several runs share; empty = `tokens` in `dir`."""
    dtype: TokenType = "auto"
    """Type of a stored token; `auto` takes the smallest that holds the vocabulary."""


TokenizerMeasurement = Literal["encode", "calls", "decode", "threads", "files", "train", "memory", "start"]


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
    measure: tuple[TokenizerMeasurement, ...] = (
        "encode", "calls", "decode", "threads", "files", "train", "memory", "start",
    )  # fmt: skip
    """What to measure; the top of benchmarking/bench_tokenizer.py explains each."""


Decoding = Literal["ar", "confidence", "steps", "prefix", "dual", "blocks", "agreement"]


@dataclass(frozen=True, kw_only=True)
class InferenceBenchmarkSpec:
    """Which weights write which texts, and how."""

    checkpoint: str = ""
    """A checkpoint: its step folder, its run folder, or `…/checkpoints/best` or `latest`; empty = random weights."""
    decodings: tuple[Decoding, ...] = ()
    """What to measure; empty = all that the weights can do. The top of benchmarking/bench_infer_latency.py explains
    each."""
    batch_sizes: tuple[Annotated[int, Ge(1)], ...] = (1, 2, 4, 8, 16, 32)
    """Texts that are written at one time."""
    length: Annotated[int, Ge(0)] = 0
    """Tokens of each text; 0 = all that the model's context holds."""
    repeats: Annotated[int, Ge(1)] = 5
    """Runs of each decoding that count."""
    warmups: Annotated[int, Ge(0)] = 1
    """Runs before them that do not."""
    steps: Annotated[int, Ge(0)] = 0
    """Passes of `steps`; 0 = one for four tokens."""
    threshold: Annotated[float, Gt(0), Le(1)] = 0.9
    """Probability from which on `prefix`, `dual` and `blocks` take a token."""
    agreement: Annotated[float, Gt(0), Le(1)] = 0.3
    """Probability from which on `agreement` takes a drafted token."""
    block_length: Annotated[int, Ge(1)] = 32
    """Tokens of a block; a model that was trained in blocks keeps to its own."""
    judge: str = ""
    """Checkpoint of a next-token model that scores the texts of each decoding; empty = only speed is measured."""
    samples: Annotated[int, Ge(1)] = 64
    """Texts of each decoding that are scored."""
    vocab_size: Annotated[int, Ge(3)] = 8192
    """Ids that random weights tell apart."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of random weights and of all texts."""
    weights: WeightsName = "raw"
    """`raw`: the trained weights; `ema`: their running average, where the run kept one."""
    device: str = "auto"
    """`auto` takes CUDA where it exists, else the CPU; or a device name such as `cpu`, `cuda`, `cuda:1`, `mps`."""
    precision: PrecisionName = "fp32"
    """Type of weights and arithmetic; sampling itself is always in 64-bit floats."""

    def __post_init__(self) -> None:
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty: name at least one")


# -- evaluation


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
    """What the run that made the checkpoint held out."""

    kind: Literal["run"] = "run"
    set: NotEmpty = "val"
    """`val`: what the run chose its best checkpoint by; `test`: its test set; or one of its `data.validation_sets`."""


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
    """Files or folders: `.jsonl` and `.parquet` (a document per row), `.lines` (one per line) and `.txt` (documents
    between `<|endoftext|>` lines); all but Parquet also compressed with gzip."""
    text_field: NotEmpty = "text"
    """Field or column of a row that holds its text."""


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


# -- what a run has left behind


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """Which step to train again, and what to show of it."""

    run: NotEmpty
    """Folder of the run; it is only read."""
    step: Annotated[int, Ge(1)]
    """Which step, counted from 1 as in `metrics.jsonl`."""
    rows: Annotated[int, Ge(0)] = 4
    """How many texts of the batch to show; 0 = all."""
    save: str = ""
    """File for the gradients (`.safetensors`), before clipping; empty = none."""
    processes: Annotated[int, Ge(0)] = 0
    """Processes to train with, 0 = as the run; other numbers give the same bits with `distributed.reduction = "tree"`
    only."""
    device: str = ""
    """Device to train on; empty = that of the run."""


@dataclass(frozen=True, kw_only=True)
class ComparedRunsSpec:
    """Two runs to compare."""

    first: str = ""
    """Folder of the one."""
    second: str = ""
    """Folder of the other."""
    tensors: bool = True
    """Compare the checkpoints of common steps too, which reads all of them."""
