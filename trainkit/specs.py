"""Every setting of the kit, as frozen dataclasses that import nothing heavy.

Bounds stand in the annotation, so that whoever validates (the project does it with Pydantic in `config`) reports an
error at the field's path. The string below a field is its documentation; command-line help and the JSON Schema show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """The loop: how long, how large a step, how often to look."""

    max_steps: Annotated[int, Ge(1)] = 1000
    """Optimizer steps of the run. Intervals and horizons count optimizer steps too."""
    total_batch_size: Annotated[int, Ge(1)] = 8192
    """Units (tokens, for a language model) of one optimizer step over all ranks; a multiple of the sample length."""
    batch_size_factors: tuple[tuple[Annotated[int, Ge(0)], Annotated[int, Ge(1)]], ...] = ()
    """Pairs (step, factor): from that step on (the first is 0) a step takes `factor` times `total_batch_size`."""
    context_length_divisors: tuple[tuple[Annotated[int, Ge(0)], Annotated[int, Ge(1)]], ...] = ()
    """Pairs (step, divisor): from that step on each window of text is cut into so many shorter ones, for instance
    `[[0, 4], [1000, 2], [2000, 1]]`."""
    device_batch_size: Annotated[int, Ge(0)] = 8
    """Samples of one forward and backward pass on one device; gradients accumulate until the step is complete. 0 finds
    the most that fit on CUDA, by trials before the run, and is 8 elsewhere; the run records the number."""
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between two training records."""
    eval_every: Annotated[int, Ge(0)] = 250
    """Steps between two validations; 0 validates only at the end."""
    save_every: Annotated[int, Ge(0)] = 250
    """Steps between two checkpoints; 0 saves only at the end (and when interrupted)."""
    sample_every: Annotated[int, Ge(0)] = 0
    """Steps between two rounds of samples; 0 = only at the end."""
    skip_validation: bool = False
    """Never validate, not even at the end; `best` then does not exist."""
    gradient_clip: Annotated[float, Ge(0)] = 1.0
    """Largest global L2 norm of the gradient; 0 does not clip."""
    precision: Precision = "fp32"
    """Type of the forward and backward arithmetic; weights, gradients and optimizer state stay in 32-bit floats. `auto`
    is `bf16` where the processor multiplies it natively (NVIDIA from Ampere on, CPUs with AVX512-BF16 or AMX), else
    `fp32`."""
    compile: bool = False
    """Run the model through `torch.compile`."""
    deterministic: bool = False
    """Ask PyTorch for deterministic kernels: bit-exact resume on CUDA needs it, at a cost in speed; on CPU they are."""
    max_skipped_steps: Annotated[int, Ge(1)] = 10
    """A step whose loss or gradient is infinite or NaN changes nothing; so many in a row end the run (exit code 3)."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Decay per step of the averaged weights that evaluation and inference can use; 0 keeps none."""
    device: str = "auto"
    """`auto` takes CUDA where it exists, else the CPU; or a device name such as `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads of each rank; 0 leaves PyTorch's choice. Bit-exact resume on CPU needs the same number."""

    def __post_init__(self) -> None:
        for name in ("batch_size_factors", "context_length_divisors"):
            steps = [step for step, _ in getattr(self, name)]
            if steps != sorted(set(steps)):
                raise ValueError(f"{name} names the steps {steps}: they must ascend")


@dataclass(frozen=True, kw_only=True)
class DistributedSpec:
    """How several processes train one model. Under `torchrun` its settings decide how many there are, and where."""

    processes: Literal["auto"] | Annotated[int, Ge(1)] = 1
    """Processes to start on this machine; `auto` is one for each GPU, and one where there is none."""
    strategy: Literal["replicate", "zero1", "fsdp"] = "replicate"
    """What every process holds. `replicate`: all of it. `zero1`: all weights, but optimizer state for a share of them
    only (arXiv:1910.02054). `fsdp`: a share of everything (PyTorch's FSDP2), for large models; AdamW only."""
    reduction: Literal["sum", "tree"] = "sum"
    """`sum` adds gradients in the fastest order. `tree` adds them in an order that does not depend on the number of
    processes, so that 1, 2, 4 or 8 of them compute the same bits; needs `training.threads`, and micro-batches of one
    size (`training.device_batch_size`), which may then not change when the run resumes."""
    watchdog_seconds: Annotated[float, Ge(0)] = 600.0
    """End a process, with its stacks, that takes longer than this for one step (phases that are long by nature get a
    multiple): a rank hangs or died. 0 waits for ever."""


@dataclass(frozen=True, kw_only=True)
class AdamWSpec:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decay of matrices; vectors (norm gains, biases) and embeddings are not decayed."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment."""
    base_width: Annotated[int, Ge(0)] = 0
    """Learning rate of a matrix with w inputs is `learning_rate` · `base_width` / w, so that the best one for a narrow
    model serves a wide one (muP, arXiv:2203.03466); 0 = the same for all."""


@dataclass(frozen=True, kw_only=True)
class MuonSpec:
    """Orthogonalised momentum for hidden matrices, AdamW for the rest; see `trainkit.muon`."""

    kind: Literal["muon"] = "muon"
    learning_rate: Annotated[float, Gt(0)] = 3e-3
    """Peak learning rate of all parameters; the schedule multiplies it."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decay of matrices; vectors and embeddings are not decayed."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of the matrices' momentum."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """AdamW's decay of the second moment."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's addition to the root of the second moment."""


OptimizerSpec = AdamWSpec | MuonSpec


@dataclass(frozen=True, kw_only=True)
class ConstantScheduleSpec:
    """Warm up linearly, then stay at the peak."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up."""


@dataclass(frozen=True, kw_only=True)
class CosineScheduleSpec:
    """Warm up linearly, then follow half a cosine down to `final_fraction` at the last step (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Annotated[int, Ge(0)] = 100
    """Steps of linear warm-up."""
    final_fraction: Annotated[float, Ge(0), Le(1)] = 0.1
    """Learning rate at the last step, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class WSDScheduleSpec:
    """Warm up, stay at the peak, decay linearly at the end ("warmup-stable-decay", arXiv:2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Annotated[int, Ge(0)] = 100
    """Steps of linear warm-up."""
    decay_fraction: Annotated[float, Ge(0), Le(1)] = 0.2
    """Share of the run that the final decay takes."""
    final_fraction: Annotated[float, Ge(0), Le(1)] = 0.0
    """Learning rate at the last step, as a fraction of the peak."""


ScheduleSpec = ConstantScheduleSpec | CosineScheduleSpec | WSDScheduleSpec


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """What is kept under `runs/<run>/checkpoints`. The newest and the best are always kept."""

    keep_last: Annotated[int, Ge(1)] = 2
    """How many of the newest checkpoints to keep."""
    keep_every: Annotated[int, Ge(0)] = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 = none."""
    save_optimizer: bool = True
    """Write the optimizer's state: needed to resume, not to infer."""
    remote: str = ""
    """Where checkpoints are copied to as well: an fsspec URL such as `s3://bucket/folder`; empty = nowhere. A run whose
    folder is empty resumes from there."""
    resume_from: str = ""
    """Checkpoint of another run from which a new run goes on: its step folder, its run folder, or `…/checkpoints/best`
    or `latest`. Once the run has a checkpoint of its own, it goes on from that."""
    resume_optimizer: bool = True
    """Take over the optimizer's state with `resume_from`; `false` starts it anew."""
    init_from: str = ""
    """Checkpoint whose weights a new run begins with, at its own step 0; named as for `resume_from`."""

    def __post_init__(self) -> None:
        if self.resume_from and self.init_from:
            raise ValueError("has both resume_from and init_from: a run begins from one of them")


@dataclass(frozen=True, kw_only=True)
class LoggingSpec:
    """Where records go besides `metrics.jsonl`, which is always written."""

    console: Literal["auto", "live", "json", "off"] = "auto"
    """`auto`: live progress on a terminal, pure JSON lines otherwise."""
    csv: bool = True
    """Write `metrics.csv`."""
    tensorboard: bool = False
    """Write `tensorboard/`, for `tensorboard --logdir runs`."""
    plots: bool = True
    """Draw `plots/*.png` at the end of the run, and after each validation."""
    norms_every: Annotated[int, Ge(0)] = 100
    """Steps between two records of norms: gradients, weights and updates of each layer; 0 = none."""
    activation_norms: bool = False
    """With the norms, measure the output of each layer as well; not with `training.compile`."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send the records to Weights & Biases: `online` needs `WANDB_API_KEY` or a login; `offline` writes below the run
    directory, for `wandb sync` later. A resumed run continues there too."""
    wandb_project: str = ""
    """Name of the project there; empty = what `WANDB_PROJECT` says, else `uncategorized`."""
    wandb_entity: str = ""
    """User or team there; empty = the account's own."""
    wandb_artifacts: bool = False
    """At the end, also send the newest checkpoint there as an artifact."""
