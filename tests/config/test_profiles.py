"""The shipped profiles: as large as they say, on hardware that holds them, and the README's table is what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli import profiles
from cli.estimates import count_parameters, estimate_memory
from cli.marks import between_marks
from cli.pipeline import main as pipeline
from config.corpora import FilesCorpusSpec
from config.loading import load, shipped
from config.schemas import PipelineConfig, TrainConfig
from transformerlm.models.build import create_model

ROOT = Path(__file__).parents[2]
GPT2_VOCABULARY = 50_257
SIZES = {
    "m3_medium": (22_323_072, 22e6),
    "runpod_1b": (1_000_430_592, 1.0e9),
    "runpod_2b": (1_974_097_408, 1.97e9),
    "runpod_4b": (4_007_890_944, 4.0e9),
}
"""Parameters of each profile: exactly, and as its name or its documentation says."""


@pytest.mark.parametrize("name", SIZES)
def test_profiles_are_as_large_as_they_say(name: str) -> None:
    config = load(PipelineConfig, shipped(name)).config
    exact, claimed = SIZES[name]
    model = create_model(config.model, vocab_size=config.tokenizer.vocab_size, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config, config.tokenizer.vocab_size) == exact
    assert exact == pytest.approx(claimed, rel=0.02)
    assert isinstance(config.corpus, FilesCorpusSpec)
    assert config.artifacts.dir == f"artifacts/{name}" and config.run.name == name


@pytest.mark.parametrize("row", profiles.ROWS, ids=lambda row: f"{row.profile}-{row.hardware.label}")
def test_profiles_fit_where_they_are_meant_for(row: profiles.Row) -> None:
    config = load(PipelineConfig, shipped(row.profile)).config
    memory = estimate_memory(config, config.tokenizer.vocab_size, row.hardware.gpus)
    for_cuda_and_fragments = 6
    assert memory.peak / profiles.GIB < row.hardware.memory_gib - for_cuda_and_fragments
    windows = config.training.total_batch_size // config.model.context_length
    assert windows % (config.training.device_batch_size * row.hardware.gpus) == 0  # no pass is partly empty


def test_the_table_in_the_readme_is_what_the_command_writes() -> None:
    table = profiles.table(profiles.ROWS)
    assert between_marks(ROOT / "README.md", profiles.MARKS) == table, "run: uv run python -m cli.profiles --write …"
    assert {line.split("`")[1] for line in table.splitlines()[2:]} == set(SIZES)


def test_the_table_of_one_profile_takes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiles.main(["runpod_2b", "--gpu", "H100", "--gpus", "8", "training.max_steps=10"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| 8 × H100 | 1.97B |" in line and "5.24M tokens" in line
    with pytest.raises(SystemExit) as ended:
        profiles.main(["runpod_2b", "training.max_step=10"])
    assert ended.value.code == 2 and "did you mean `training.max_steps`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_profiles_train_on_one_plain_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("".join(f"Tom has {n} red balls, and {n} + 1 is {n + 1}.\n" for n in range(1500)))
    flags = ("--profile", name, "--input", "input.txt", "--run-dir", "runs/try")
    small = (
        "tokenizer.vocab_size=300", "model.num_layers=2", "model.d_model=64", "model.d_ff=96", "model.num_heads=4",
        "model.context_length=64", "training.total_batch_size=512", "training.device_batch_size=2",
        "training.max_steps=2", "training.compile=false", "training.threads=1", "schedule.warmup_steps=1",
        "evaluation.max_documents=2", "logging.plots=false", "objective.loss_chunk_size=100",
    )  # fmt: skip
    kv_heads = () if name == "m3_medium" else ("model.num_kv_heads=1",)
    assert pipeline([*flags, *small, *kv_heads]) == 0
    records = [json.loads(line) for line in Path("runs/try/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"][-1] == 2
    assert list(Path("runs/try/tensorboard").iterdir())


def test_the_baseline_is_what_its_documentation_says() -> None:
    config = load(TrainConfig, shipped("baseline_transformer")).config
    assert (config.model.num_layers, config.model.d_model, config.model.num_heads) == (12, 768, 12)
    assert (config.model.context_length, config.run.name) == (1024, "baseline-d12")
    training = config.training
    assert (training.device_batch_size, training.total_batch_size, training.max_steps) == (24, 262_144, 10_000)
    assert (training.eval_every, training.save_every, config.optimizer.learning_rate) == (250, 2500, 6e-4)
    assert config.distributed.processes == "auto"  # all GPUs
    assert getattr(config.data, "dataset_name", "") == "roneneldan/TinyStories"
    model = create_model(config.model, vocab_size=GPT2_VOCABULARY, device="meta")
    without_embeddings = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    assert without_embeddings == pytest.approx(85e6, rel=0.02)
    other = load(TrainConfig, shipped("diffusion_transformer")).config
    assert other.training.objective == other.objective.kind == "diffusion"
    assert other.model.noise_embedding and other.data == config.data


def test_layers_width_and_batch_are_chosen_without_a_file() -> None:
    words = ["model.depth=6", "training.device_batch_size=8", "model.d_ff=1536", "--print-config", "json"]
    command = [sys.executable, "-m", "cli.train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    config = json.loads(done.stdout)
    model = config["model"]
    assert (model["num_layers"], model["d_model"], model["num_heads"], model["d_ff"]) == (6, 384, 6, 1536)
    assert config["training"]["device_batch_size"] == 8


def test_the_feed_forward_layer_is_as_wide_as_asked() -> None:
    config = load(TrainConfig, shipped("train"), ["model.depth=2", "model.d_ff=512"]).config
    block = create_model(config.model, vocab_size=300, device="meta").blocks[0]
    assert {"feed_forward.gate_up.weight": (1024, 128), "feed_forward.down.weight": (128, 512)}.items() <= {
        name: tuple(p.shape) for name, p in block.named_parameters()
    }.items()
