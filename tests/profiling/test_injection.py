"""The ranges that NVTX hands to a profiler: real training and real decoding, with a library in the profiler's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.token_files import build_token_files
from config.corpora import GrammarCorpusSpec
from tests.profiling.timelines import build_library, paths_of_ranges
from transformerlm.corpus.stories import sample
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.trainer import train_tokenizer

PROGRAM = """
import json, sys
from cli import infer, train
commands = {"train": train.main, "infer": infer.main}
sys.exit(any([commands[name](arguments) for name, arguments in json.loads(sys.argv[1])]))
"""

PHASES = {"trial", "data", "step", "evaluate", "sample", "save", "write", "prefill", "decode", "denoise"}
COARSE = PHASES | {
    *(f"step/{part}" for part in ("transfer", "forward", "backward", "optimizer")),
    *(f"sample/{part}" for part in ("prefill", "decode", "denoise")),
    "evaluate/score",
}
PASSES = (
    "trial",
    "step/forward",
    "evaluate/score",
    *(f"{at}{p}" for at in ("", "sample/") for p in ("prefill", "decode", "denoise")),
)
DRAWS = {f"{name}/draw" for name in PASSES if name.endswith(("prefill", "decode", "denoise"))}
FINE = COARSE | DRAWS | {f"{name}/{part}" for name in PASSES for part in ("attention", "feed_forward", "head")}
VERBOSE = (
    COARSE
    | DRAWS
    | {f"{name}/{part}" for name in PASSES for part in ("layer", "layer/attention", "layer/feed_forward", "head")}
    | {f"{name}/layer/attention/mixing" for name in PASSES}
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tokenizer = train_tokenizer([sample(0, index) for index in range(30)], TokenizerTrainingSpec(vocab_size=300))
    tokenizer.save(folder / "tokenizer")
    build_token_files(GrammarCorpusSpec(num_train_stories=6), "train", tokenizer, folder / "tokens", workers=1)
    return folder


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        pytest.param("coarse", COARSE, marks=pytest.mark.slow),
        pytest.param("fine", FINE, marks=pytest.mark.slow),
        ("verbose", VERBOSE),
    ],
)
def test_training_and_decoding_at_each_level(
    tmp_path: Path, files: Path, library: Path, level: str, expected: set[str]
) -> None:
    decode = ["--checkpoint", str(tmp_path / "r"), "--prompt", "Once", "inference.total_length=6", "--device", "cpu"]
    commands = [
        ["train", settings(tmp_path, files)],
        *(["infer", [*decode, f"inference.mode={mode}"]] for mode in ("ar", "diffusion")),
    ]
    assert paths_of_ranges(recorded(tmp_path, library, level, commands)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_ranks_that_add_gradients(tmp_path: Path, files: Path, library: Path, strategy: str) -> None:
    several = ["distributed.processes=2", f"distributed.strategy={strategy}", "training.threads=1"]
    commands = [["train", [*settings(tmp_path, files), *several]]]
    paths = paths_of_ranges(recorded(tmp_path, library, "verbose", commands))
    assert {"step/reduce", "step/forward/layer/attention/mixing", "step/backward", "write"} <= paths


def test_switched_off_there_is_none(tmp_path: Path, files: Path, library: Path) -> None:
    record = tmp_path / "record"
    code = "from profiling import nvtx\nwith nvtx.range('a'): print('done')"
    environment = clean_environment() | injected(library, record)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not record.exists()


def recorded(folder: Path, library: Path, level: str, commands: list[list[object]]) -> Path:
    record = folder / "record"
    environment = clean_environment() | injected(library, record)
    environment |= {"TRANSFORMERLM_NVTX": "1", "TRANSFORMERLM_NVTX_LEVEL": level}
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return record


def injected(library: Path, record: Path) -> dict[str, str]:
    return {"NVTX_INJECTION64_PATH": str(library), "NVTX_RECORD": str(record)}


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERLM_NVTX")}


def settings(folder: Path, files: Path) -> list[str]:
    """Two steps of a dual model, which writes both ways; validated, sampled and saved."""
    return [
        *("model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.context_length=32"),
        *("training.total_batch_size=256", "training.device_batch_size=4", "training.max_steps=2"),
        *("training.objective=dual", "training.device=cpu", "logging.plots=false", "evaluation.draws=1"),
        *('inference.prompts=["Once"]', "inference.total_length=6", f"tokenizer.path={files / 'tokenizer'}"),
        *(f"data.megatron_train_prefix={files / 'tokens'}", f"data.megatron_val_prefix={files / 'tokens'}"),
        *(f"run.dir={folder}", "run.name=r"),
    ]
