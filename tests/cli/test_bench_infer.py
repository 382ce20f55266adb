"""`transformerlm-bench-infer` on tiny models: what it counts can be counted by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarking.bench_infer_latency import entropy, spread
from cli import bench_infer
from tests.models.checkpoints import SPEC, write_checkpoint
from transformerlm.models.specs import Reading

TINY = [
    "--device=cpu", "model.context_length=25", "model.num_layers=1", "model.d_model=16", "model.num_heads=2",
    "benchmark.vocab_size=40", "benchmark.length=24", "benchmark.repeats=2", "benchmark.block_length=6",
    "benchmark.threshold=1.0", "benchmark.agreement=1.0", "benchmark.batch_sizes=[1, 3]",
]  # fmt: skip


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    assert bench_infer.main(list(arguments)) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_random_weights_are_read_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    out, report = measured(capsys, *TINY)
    rows = {(row["decoding"], row["batch_size"]): row for row in report["speed"]}
    names = ["ar", "confidence", "steps", "prefix", "dual", "blocks", "agreement"]
    assert list(rows) == [(name, size) for size in (1, 3) for name in names]
    assert out.count("batch of ") == 2 and all(f"\n{name} " in out for name in names)
    # Passes for 24 tokens: one each; six in all; and one more for each block of six (25 places: five blocks) that fills
    # a cache, except that an exact one has nothing to keep before the first; agreement takes a second pass each time.
    passes = {"ar": 24, "confidence": 24, "steps": 6, "prefix": 29, "dual": 29, "blocks": 28, "agreement": 53}
    positions = {"ar": 24, "confidence": 24 * 25, "steps": 6 * 25}
    for (name, _), row in rows.items():
        assert row["forwards_per_token"] * 24 == pytest.approx(passes[name])
        assert row["tokens_per_forward"] * passes[name] == pytest.approx(24)
        if name in positions:
            assert row["positions_per_token"] * 24 == pytest.approx(positions[name])
        assert 0 < row["first_token"]["mean"] <= row["seconds"]["mean"] and row["tokens_per_second"] > 0
        assert (row["confidence"] is None) == (name == "ar")
    assert rows["steps", 3]["tokens_per_step"]["mean"] == pytest.approx(4.0)
    assert rows["ar", 1]["over_ar"] == 1.0
    assert report["settings"]["benchmark"]["vocab_size"] == 40 and report["quality"] == []


def write(run: Path, reading: Reading) -> Path:
    write_checkpoint(run, 1, reading=reading)
    return run


def test_a_checkpoint_and_its_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dual = write(tmp_path / "dual", Reading(modes=("ar", "diffusion")))
    judge = write(tmp_path / "judge", Reading())
    out, report = measured(
        capsys, "--ckpt", str(dual), f"benchmark.judge={judge}", "--device=cpu", "benchmark.samples=5",
        "benchmark.repeats=1", "benchmark.warmups=0", "benchmark.batch_sizes=[2]", "benchmark.block_length=16",
    )  # fmt: skip
    names = ["ar", "confidence", "steps", "prefix", "dual", "agreement"]
    assert [row["decoding"] for row in report["quality"]] == [row["decoding"] for row in report["speed"]] == names
    for row in report["quality"]:
        assert row["nats_per_token"] > 0 and 0 < row["token_entropy"] <= row["pair_entropy"] + 1e-9
        assert row["tokens_per_text"] <= SPEC.context_length - 1
    assert "5 texts under" in out
    # The judge is the same network: what it has written itself it finds as likely as its own entropy says, others less.
    likely = {row["decoding"]: row["nats_per_token"] for row in report["quality"]}
    assert likely["ar"] < min(likely["confidence"], likely["steps"])


def test_blocks_are_the_checkpoints_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = write(tmp_path, Reading(modes=("diffusion",), alignment="in_place", block_size=8))
    _, report = measured(
        capsys, "--ckpt", str(blocks), "--device=cpu", "benchmark.repeats=1", "benchmark.warmups=0",
        "benchmark.batch_sizes=[1]", "benchmark.length=20",
    )  # fmt: skip
    assert [row["decoding"] for row in report["speed"]] == ["confidence", "steps", "blocks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark.length=25"], "benchmark.length (25) must be below the model's context of 25"),
        (["benchmark.judge=runs/ar"], "random weights write none"),
        (["benchmark.batch_sizes=[]"], "batch_sizes is empty"),
        (["benchmark.checkpoint=RUN", 'benchmark.decodings=["steps", "ar"]'], "benchmark.decodings: steps is nothing"),
        (["benchmark.checkpoint=RUN", "benchmark.judge=DIFFUSION"], "was not trained for next tokens"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    paths = {
        "RUN": write(tmp_path / "ar", Reading()),
        "DIFFUSION": write(tmp_path / "d", replace(Reading(), modes=("diffusion",))),
    }
    for name, path in paths.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert bench_infer.main([*TINY, *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


def test_spread_and_entropy() -> None:
    assert spread([1.0, 2.0, 3.0]) == {
        "mean": 2.0, "deviation": 1.0, "p50": 2.0, "p90": pytest.approx(2.8), "p99": pytest.approx(2.98)
    }  # fmt: skip
    assert spread([4.0])["deviation"] == 0.0
    assert entropy(iter("aabb")) == pytest.approx(math.log(2)) and entropy(iter("aaa")) == 0.0
