"""`transformerlm-diff-runs`: names the first number that differs, and says what it could not look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cli import diff_runs as command
from trainkit.artifacts import publish_directory
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE
from trainkit.logging.records import encode_record, stamp

Tensors = dict[str, torch.Tensor]


def record(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "tokens_per_second": 1.0 * step, **more}


def write_records(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_bytes(b"".join(encode_record(stamp(one)) for one in records))


def write_checkpoint(run: Path, step: int, model: Tensors, optimizer: Tensors) -> None:
    with publish_directory(run / "checkpoints" / f"step-{step:08d}", replace=True) as directory:
        safetensors.torch.save_file(model, directory / "model.safetensors")
        safetensors.torch.save_file(optimizer, directory / "optimizer-00000.safetensors")


def weights(step: int) -> tuple[Tensors, Tensors]:
    model = {"a.weight": torch.arange(6.0).view(2, 3) + step, "b.weight": torch.ones(2, dtype=torch.bfloat16)}
    return model, {"a.weight/exp_avg": torch.full((2, 3), float(step)), "a.weight/step": torch.tensor(float(step))}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal runs that took different times."""
    paths = tmp_path / "one", tmp_path / "other"
    for number, run in enumerate(paths):
        run.mkdir()
        config = {"run": {"name": run.name, "seed": 1}, "optimizer": {"learning_rate": 0.1}, "inputs": {"train": "x"}}
        (run / "config.json").write_text(json.dumps(config))
        (run / "environment.json").write_text(json.dumps({"torch": "2.9", "threads": 1, "command": run.name}))
        write_records(run, [record(s, 1 / s, step_seconds=number + s / 7, memory_bytes=number) for s in range(1, 7)])
        for step in (2, 4, 6):
            write_checkpoint(run, step, *weights(step))
    return paths


def compare(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], *more: str, code: int = EXIT_FAILURE
) -> dict[str, Any]:
    assert command.main(["--json", *map(str, runs), *more]) == code
    return json.loads(capsys.readouterr().out)


def change(run: Path, step: int, part: str, name: str, index: int, by: float) -> None:
    """Add to one element of one tensor of one checkpoint."""
    model, optimizer = weights(step)
    tensor = {"model": model, "optimizer": optimizer}[part][name]
    tensor.view(-1)[index] += by
    write_checkpoint(run, step, model, optimizer)


def test_equal_runs_are_equal_whatever_time_they_took(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(runs, capsys, code=0)
    assert found["equal"] and found["records"] == 6 and found["checkpoints"] == [2, 4, 6] and not found["notes"]
    assert found["harmless_settings"] == {"run.name": '"one" -> "other"'} and not found["environment"]
    assert command.main([*map(str, runs)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal in all that both have"


@pytest.mark.parametrize("step", [1, 3, 6])
def test_the_first_metric_that_differs_by_one_bit_is_named(
    runs: tuple[Path, Path], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    next_up = torch.tensor(1 / step, dtype=torch.float64).nextafter(torch.tensor(2.0, dtype=torch.float64)).item()
    write_records(runs[1], [record(s, next_up if s == step else 1 / s if s < step else 9.0) for s in range(1, 7)])
    found = compare(runs, capsys)
    assert (found["metric"]["step"], found["metric"]["name"]) == (step, "loss") and found["step"] == step
    assert found["metric"]["second"]["hex"] == next_up.hex() != found["metric"]["first"]["hex"]
    command.main([*map(str, runs)])
    assert f"the first known difference is of step {step}" in capsys.readouterr().out


def test_the_first_tensor_is_named_weights_before_optimizer(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change(runs[1], 6, "model", "a.weight", 0, 1.0)
    change(runs[1], 4, "optimizer", "a.weight/exp_avg", 5, -0.25)
    tensor = compare(runs, capsys)["tensor"]
    assert (tensor["step"], tensor["part"], tensor["name"]) == (4, "optimizer", "a.weight/exp_avg")
    assert (tensor["max_difference"], tensor["elements"], tensor["tensors"], tensor["of"]) == (0.25, 1, 1, 4)
    model, optimizer = weights(4)
    model["b.weight"][1] = -0.0
    model["a.weight"] = model["a.weight"].clone()
    optimizer["a.weight/step"] += 1
    write_checkpoint(runs[1], 4, model, optimizer)
    tensor = compare(runs, capsys)["tensor"]
    assert (tensor["part"], tensor["name"], tensor["max_difference"], tensor["tensors"]) == (
        "model",
        "b.weight",
        1.0,
        2,
    )
    command.main([*map(str, runs)])
    assert "still equal at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(("old", "new", "differs"), [(0.0, -0.0, True), (float("nan"), float("nan"), False)])
def test_tensors_are_compared_by_their_bits(
    runs: tuple[Path, Path], old: float, new: float, differs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, value in zip(runs, (old, new), strict=True):
        write_checkpoint(run, 2, {"a": torch.tensor([value, 1.0])}, {})
    found = compare(runs, capsys, code=EXIT_FAILURE if differs else 0)
    assert (found["tensor"] is not None) == differs


def test_shapes_and_missing_tensors_are_differences(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(runs[1], 2, {"a.weight": torch.ones(3, 2), "c": torch.ones(1)}, {})
    tensor = compare(runs, capsys)["tensor"]
    assert tensor["name"] == "a.weight" and "(2, 3)" in tensor["what"] and tensor["max_difference"] is None
    assert tensor["tensors"] == 3


def test_settings_come_first(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((runs[1] / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.2
    (runs[1] / "config.json").write_text(json.dumps(config))
    (runs[1] / "environment.json").write_text(json.dumps({"torch": "2.9", "threads": 4}))
    found = compare(runs, capsys)
    assert found["settings"] == {"optimizer.learning_rate": "0.1 -> 0.2"} and found["step"] is None
    assert found["environment"] == {"threads": "1 -> 4"}
    command.main([*map(str, runs)])
    text = capsys.readouterr().out
    assert text.index("optimizer.learning_rate") < text.index("records ") and "different settings" in text


def test_where_a_run_began_decides_about_its_numbers(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Though a run that resumes may change it; other settings of checkpoints are no matter."""
    for run, start, keep in zip(runs, ("", "runs/a"), (1, 2), strict=True):
        config = json.loads((run / "config.json").read_text())
        config["checkpoint"] = {"init_from": start, "keep_last": keep}
        (run / "config.json").write_text(json.dumps(config))
    assert list(compare(runs, capsys)["settings"]) == ["checkpoint.init_from"]


def test_what_is_damaged_or_missing_is_said_and_the_rest_compared(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = runs
    (one / "config.json").write_text("{")
    (one / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"x")
    shutil.rmtree(other / "checkpoints" / "step-00000006")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join([*lines[:2], "{damaged", *lines[3:5], lines[5][:20]]))
    found = compare(runs, capsys, code=0)
    assert found["checkpoints"] == [4] and found["records"] == 4
    for word in ("config.json is missing or damaged", "step 2 is passed over", "2 damaged lines", "records are in"):
        assert any(word in note for note in found["notes"]), found["notes"]
    shutil.rmtree(one / "checkpoints")
    (one / "metrics.jsonl").unlink()
    assert command.main([*map(str, runs)]) == EXIT_USAGE
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and "no step in common" in output.err


def test_usage(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one = str(runs[0])
    for arguments, message in (
        ([], "name the folders of two runs"),
        ([one], "name the folders of two runs"),
        ([one, one, one], "two runs are compared"),
        ([one, f"{one}-none"], "is no folder"),
    ):
        assert command.main(arguments) == EXIT_USAGE
        assert message in capsys.readouterr().err
    assert command.main([f"runs.first={one}", f"runs.second={runs[1]}", "runs.tensors=false"]) == 0
    assert "tensors   not compared" in capsys.readouterr().out
