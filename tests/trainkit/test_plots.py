"""Plots are made from the metrics file alone, whatever is in it."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from trainkit.errors import UserError
from trainkit.logging.jsonl import MetricsFile
from trainkit.logging.records import Record, Scalar, stamp
from trainkit.plots import DRAWINGS, draw_plots, smooth

NAMES = ["loss.png", "learning_rate.png", "gradient_norm.png", "throughput.png"]


def write_metrics(directory: Path, *records: Mapping[str, Scalar]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(directory / "metrics.jsonl")
    for record in records:
        file.write(stamp(record))
    file.close()
    return file.path


def training(step: int, loss: float = 2.0) -> dict[str, Scalar]:
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "learning_rate": 3e-4,
        "gradient_norm": 1.0 / step,
        "tokens_per_second": 1e5,
    }


def has_colour(path: Path, colour: tuple[int, int, int]) -> bool:
    """Whether a line or marker of this colour is visible."""
    pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
    return (pixels == colour).all(axis=2).sum() > 50


BLUE, ORANGE = (0x25, 0x63, 0xA8), (0xD9, 0x62, 0x2B)


def test_four_pictures_decode(tmp_path: Path) -> None:
    noise = random.Random(0)
    records = [training(step, 2 + 6 * math.exp(-step / 50) + noise.gauss(0, 0.1)) for step in range(1, 300)]
    validations = [{"kind": "eval", "step": step, "val_loss": 2.5} for step in (100, 200)]
    drawn = draw_plots(write_metrics(tmp_path / "run_a$b$", *records, *validations), tmp_path / "plots")
    assert [path.name for path in drawn] == NAMES
    for path in drawn:
        image = imread(path)
        assert image.shape == (675, 1200, 4)
        assert has_colour(path, BLUE)
        assert has_colour(path, ORANGE) == (path.name == "loss.png")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([], []),
        ([{"kind": "message", "step": 1, "text": "hello"}], []),
        ([training(1)], NAMES),
        ([{"kind": "eval", "step": 5, "val_loss": 2.0}], ["loss.png"]),
        ([{"kind": "train", "step": 5, "loss": -2.0}, {"kind": "train", "step": 6, "loss": 0.0}], ["loss.png"]),
        ([training(1), {"kind": "train", "step": 2, "loss": math.nan}, training(3, math.inf)], NAMES),
        ([{"kind": "train", "step": 2, "loss": math.nan}], []),
        ([training(1), training(2, 1e30), training(3, 1e-30)], NAMES),
    ],
)
def test_whatever_there_is_is_drawn(tmp_path: Path, records: list[Mapping[str, Scalar]], names: list[str]) -> None:
    assert [path.name for path in draw_plots(write_metrics(tmp_path, *records), tmp_path / "plots")] == names


def test_named_validation_sets_have_curves_of_their_own() -> None:
    records: list[Record] = [
        {"kind": "eval", "step": step, "time": 0.0, "val_loss": 2.5, "val_loss/wiki": 3.0 - step / 10}
        for step in (1, 2)
    ]
    axes = Figure().add_subplot()
    assert DRAWINGS["loss"](axes, records)
    assert "wiki" in axes.get_legend_handles_labels()[1]


@pytest.mark.parametrize("layers", [1, 2, 40])
def test_norms_have_a_curve_for_each_layer_and_few_names(tmp_path: Path, layers: int) -> None:
    records = [
        {"kind": "norms", "step": step}
        | {f"{name}/blocks.{i}": (i + 1.0) * step for i in range(layers) for name in ("gradient_norm", "weight_norm")}
        for step in (100, 200)
    ]
    drawn = draw_plots(write_metrics(tmp_path, *records), tmp_path / "plots")
    assert [path.name for path in drawn] == ["gradient_norm_layers.png", "weight_norm_layers.png"]
    axes = Figure().add_subplot()
    assert DRAWINGS["weight_norm_layers"](axes, [stamp(record) for record in records])
    assert len(axes.lines) == layers
    names = axes.get_legend_handles_labels()[1]
    assert len(names) == min(layers, 8) and names[-1] == f"blocks.{layers - 1}"


def test_a_torn_line_is_no_obstacle_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, training(1))
    with path.open("ab") as file:
        file.write(b'{"kind": "tr')
    assert len(draw_plots(path, tmp_path / "plots")) == 4
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(UserError, match="line 2"):
        draw_plots(path, tmp_path / "plots")


def test_smoothing_follows_a_steep_start_and_calms_the_rest() -> None:
    steps = np.arange(900.0)
    line = steps / 90
    smoothed = smooth((steps, line))
    assert np.array_equal(smoothed[0], steps)
    assert np.allclose(smoothed[1][:870], line[:870])  # a straight line stays, where the window is whole
    noise = np.random.default_rng(0).normal(size=900)
    assert np.array_equal(smooth((steps, noise))[1][:30], noise[:30])
    assert smooth((steps, noise))[1][450:].std() < 0.3 * noise[450:].std()


def test_smoothing_survives_one_huge_value() -> None:
    values = np.ones(900)
    values[10] = 1e25
    assert (smooth((np.arange(900.0), values))[1] == values).all()


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 54321])
def test_smoothing_draws_no_more_than_can_be_seen(count: int) -> None:
    steps = np.arange(float(count))
    at, means = smooth((steps, steps))
    assert len(at) == len(means) == min(count, 1000)
    assert count == 0 or (at[0], at[-1]) == (0, count - 1)


def test_threads_may_draw(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, *(training(step) for step in range(1, 20)))
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(len(draw_plots(path, tmp_path / str(n))))) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4, 4]


def test_nobody_pays_for_plots_who_draws_none() -> None:
    program = (
        "import sys, trainkit.plots; assert 'matplotlib.pyplot' not in sys.modules\n"
        "ours = [n for n in sys.modules if n.startswith(('trainkit', 'matplotlib', 'rich'))]\n"
        "for name in ours: del sys.modules[name]\n"
        "import trainkit.logging.run_log, trainkit.run_directory\n"
        "heavy = {'matplotlib', 'rich', 'torch', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
