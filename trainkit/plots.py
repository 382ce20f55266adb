"""The pictures of a run, drawn from its `metrics.jsonl`: loss, learning rate, norms, throughput.

Figures are made without `pyplot`, which keeps global state and is not for threads.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from trainkit.artifacts import make_directory, publish_file
from trainkit.logging.records import Record, Scalar, read_records, throughput

BLUE, ORANGE, GREY, LIGHT = "#2563a8", "#d9622b", "#6b7280", "#d7dbe0"
SMOOTHING = 0.03
"""Half the width of the smoothing window at a point, as a share of the points before it."""
MAX_POINTS = 1000
MAX_NAMED_LAYERS = 8
MAX_INSIDE_LEGEND = 4

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and their finite values."""


def draw_plots(metrics_path: Path | str, directory: Path | str) -> list[Path]:
    """Draw what the records have values for and return the files; a reader sees each whole, old or new."""
    metrics_path, directory = Path(metrics_path), Path(directory)
    records = list(read_records(metrics_path))
    make_directory(directory)
    drawn: list[Path] = []
    for name, draw in DRAWINGS.items():
        image = _draw(draw, records, metrics_path.resolve().parent.name)
        if image is not None:
            publish_file(directory / f"{name}.png", image)
            drawn.append(directory / f"{name}.png")
    return drawn


def smooth(curve: Curve) -> Curve:
    """Centred means over a window that grows with the position: the steep start stays sharp, the noisy rest is calm.

    Returns no more points than a picture can show.
    """
    steps, values = curve
    centres = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).round().astype(int))
    half = (centres * SMOOTHING).astype(int)
    # Not by differences of a running sum: after one huge value that sum has lost all small ones.
    means = [values[i - h : i + h + 1].mean() for i, h in zip(centres, half, strict=True)]
    return steps[centres], np.array(means)


def _draw_loss(axes: Axes, records: Sequence[Record]) -> bool:
    train = _curve(records, "train", lambda record: record.get("loss"))
    validation = _curve(records, "eval", lambda record: record.get("val_loss"))
    _draw_smoothed(axes, train, "training")
    steps, values = validation
    if len(steps):
        axes.plot(steps, values, "o-", color=ORANGE, markersize=4, linewidth=1.6, label="validation", zorder=3)
        best = int(np.argmin(values))
        axes.plot(steps[best], values[best], "o", color="white", markeredgecolor=ORANGE, markersize=8, zorder=4,
                  markeredgewidth=1.8, label=f"best {values[best]:.4f} at step {steps[best]:,.0f}")  # fmt: skip
    for name in _names(records, "val_loss/"):
        curve = _curve(records, "eval", lambda record, name=name: record.get(name))
        axes.plot(*curve, "o--", markersize=3, linewidth=1.2, label=name.removeprefix("val_loss/"))
    axes.set(title="Loss", ylabel="loss")
    _use_log_scale_where_it_helps(axes, np.concatenate([train[1], values]))
    return bool(len(train[0]) or len(steps))


def _draw_learning_rate(axes: Axes, records: Sequence[Record]) -> bool:
    steps, values = _curve(records, "train", lambda record: record.get("learning_rate"))
    axes.plot(steps, values, color=BLUE, linewidth=1.8)
    axes.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    return bool(len(steps))


def _draw_gradient_norm(axes: Axes, records: Sequence[Record]) -> bool:
    curve = _curve(records, "train", lambda record: record.get("gradient_norm"))
    _draw_smoothed(axes, curve, "before clipping")
    axes.set(title="Gradient norm", ylabel="global L2 norm")
    _use_log_scale_where_it_helps(axes, curve[1])
    return bool(len(curve[0]))


def _draw_throughput(axes: Axes, records: Sequence[Record]) -> bool:
    rates = [rate for record in records if (rate := throughput(record)) is not None]
    unit = rates[0][0] if rates else ""
    steps, values = _curve(records, "train", lambda record: record.get(f"{unit}_per_second"))
    axes.plot(steps, values, color=BLUE, linewidth=1.4)
    axes.set(title="Throughput", ylabel=f"{unit} / second", ylim=(0, 1.15 * max(values, default=1.0) or None))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return bool(len(steps))


def _draw_layers(axes: Axes, records: Sequence[Record], *, name: str, title: str, label: str) -> bool:
    """A curve for each layer, from dark to light in the order of the model."""
    layers = _names(records, f"{name}/")
    curves = [_curve(records, "norms", lambda record, layer=layer: record.get(layer)) for layer in layers]
    drawn = [(layer, curve) for layer, curve in zip(layers, curves, strict=True) if len(curve[0])]
    # Many layers need no name each: the first, the last and a few between tell the order.
    named = set(np.linspace(0, max(0, len(drawn) - 1), MAX_NAMED_LAYERS).round().astype(int))
    for index, (layer, curve) in enumerate(drawn):
        axes.plot(
            *curve,
            color=colormaps["viridis"](0.9 * index / max(1, len(drawn) - 1)),
            linewidth=1.4,
            marker="o" if len(curve[0]) == 1 else None,
            label=layer.removeprefix(f"{name}/") if index in named else None,
        )
    axes.set(title=title, ylabel=label)
    _use_log_scale_where_it_helps(axes, np.concatenate([np.empty(0), *(values for _, (_, values) in drawn)]))
    return bool(drawn)


DRAWINGS: dict[str, Callable[[Axes, Sequence[Record]], bool]] = {
    "loss": _draw_loss,
    "learning_rate": _draw_learning_rate,
    "gradient_norm": _draw_gradient_norm,
    "throughput": _draw_throughput,
    "gradient_norm_layers": partial(
        _draw_layers, name="gradient_norm", title="Gradient norm by layer", label="L2 norm before clipping"
    ),
    "weight_norm_layers": partial(_draw_layers, name="weight_norm", title="Weight norm by layer", label="L2 norm"),
    "update_ratio_layers": partial(
        _draw_layers, name="update_ratio", title="Update by layer", label="|update| / |weights|"
    ),
    "activation_rms_layers": partial(
        _draw_layers, name="activation_rms", title="Activations by layer", label="root mean square"
    ),
}
"""File name without `.png`, and who fills the axes; `False` = there was nothing to draw."""


def _draw(fill: Callable[[Axes, Sequence[Record]], bool], records: Sequence[Record], run_name: str) -> bytes | None:
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if not fill(axes, records):
        return None
    axes.set_title(axes.get_title(), loc="left", fontweight="bold", fontsize=13)
    axes.set_title("", loc="center")
    axes.set_title(run_name, loc="right", color=GREY, fontsize=10, parse_math=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    axes.grid(which="both", color=LIGHT, linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > MAX_INSIDE_LEGEND:  # many curves leave no room inside
        axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif handles:
        axes.legend(frameon=False, loc="upper right")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor="#374151")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_smoothed(axes: Axes, curve: Curve, label: str) -> None:
    steps, values = curve
    if not len(steps):
        return
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.9)
    marker = "o" if len(steps) == 1 else None
    axes.plot(*smooth(curve), color=BLUE, linewidth=1.8, marker=marker, label=f"{label} (smoothed)")


def _use_log_scale_where_it_helps(axes: Axes, values: NDArray[np.float64]) -> None:
    """A steep start would press the rest of a linear axis flat."""
    if not len(values) or values.min() <= 0 or values.max() < 3 * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if values.max() > 10 * values.min() else (1, 1.5, 2, 3, 4, 6, 8))
    )
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.minorticks_off()
    axes.set_ylabel(f"{axes.get_ylabel()} (log scale)")


def _names(records: Sequence[Record], prefix: str) -> list[str]:
    """The values that begin so, in the order in which they appear."""
    return list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))


def _curve(records: Sequence[Record], kind: str, value_of: Callable[[Record], Scalar]) -> Curve:
    points = [
        (float(record["step"] or 0), float(value))
        for record in records
        if record["kind"] == kind and (value := value_of(record)) is not None
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    return table[:, 0], table[:, 1]
