"""The demo's two pictures, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .layers import Layer
from .train import Row

__all__ = ["COLOURS", "curves", "layers"]

# Okabe and Ito's palette for any colour vision; ours warm and green, baselines blue.
COLOURS = {
    "LocoProp-M": "#D55E00",
    "LocoProp-S": "#E69F00",
    "AltMin (Adam)": "#009E73",
    "RMSProp": "#56B4E9",
    "Adam": "#0072B2",
}
INK = "#333333"
STYLE: dict[str, Any] = {"fontsize": 10, "color": INK}
DOTTED = (0, (1, 1.2))


def _figure(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=INK)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _plain_log(axis: Any) -> None:
    """Format a log axis with plain numbers at 1, 2, 5 times powers of ten, more for a small range."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high > 8 * low else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions from high to low, moved until neighbours are at least `gap` apart."""
    placed = list(wanted)
    for _ in range(200):
        for k in range(len(placed) - 1):
            push = max(0.0, gap - (placed[k] - placed[k + 1])) / 2
            placed[k], placed[k + 1] = placed[k] + push, placed[k + 1] - push
    return placed


def _label_ends(ax: Axes, ends: Mapping[str, float]) -> None:
    """Write each method's name beside the end of its line, to the right of the panel."""
    to_axes = ax.transData + ax.transAxes.inverted()
    names = sorted(ends, key=lambda name: -ends[name])
    heights = [float(to_axes.transform((1, ends[name]))[1]) for name in names]
    placed = _spread_out(heights, 0.06)
    lift = max(0.0, 0.02 - min(placed, default=1.0))  # none below the panel
    for name, y in zip(names, placed, strict=True):
        ax.text(
            1.02,
            y + lift,
            name,
            transform=ax.transAxes,
            va="center",
            fontsize=10,
            color=COLOURS[name],
            weight="bold",
        )


def curves(path: Path, rows: Sequence[Row], floor_train: float, floor_test: float) -> None:
    """Plot the loss by epoch and by second, above the lowest possible, on a log axis: train thick, test dotted."""
    figure, axes = _figure(11, 4.6, 2)
    ends: dict[str, float] = {}
    for method, colour in COLOURS.items():
        own = [row for row in rows if row.method == method]
        train = [row.train_loss - floor_train for row in own if row.train_loss is not None]
        test = [row.test_loss - floor_test for row in own if row.test_loss is not None]
        if not train:
            continue
        ends[method] = train[-1]
        by: list[list[float]] = [[row.epoch for row in own], [row.seconds for row in own]]
        for ax, xs, skip in zip(axes, by, (0, 1), strict=True):  # second 0 cannot be shown on a log axis
            shown = slice(skip, len(train))
            ax.plot(xs[shown], test[shown], color=colour, linewidth=1.1, linestyle=DOTTED)
            ax.plot(xs[shown], train[shown], color=colour, linewidth=2.2, markevery=[-1], marker="o", markersize=5)
    panels = (
        ("by epoch", "epochs"),
        ("by second", "seconds in the method's own steps (log scale)"),
    )
    for ax, (title, label) in zip(axes, panels, strict=True):
        ax.set_yscale("log")
        _plain_log(ax.yaxis)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set_xlabel(label, **STYLE)
    axes[0].set_xlim(left=0)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[1].set_xscale("log")
    _plain_log(axes[1].xaxis)
    axes[1].sharey(axes[0])
    axes[0].set_ylabel("loss above the lowest possible\n(nats an image, log scale)", **STYLE)
    _label_ends(axes[0], ends)
    keys = [
        Line2D([], [], color=INK, linewidth=2.2),
        Line2D([], [], color=INK, linewidth=1.1, linestyle=DOTTED),
    ]
    axes[0].legend(keys, ["train", "test"], frameon=False, fontsize=9, loc="upper right", labelcolor=INK)
    title = "A small autoencoder on handwritten digits: same start, same minibatches"
    failures = [f"{row.method} failed in epoch {row.epoch}" for row in rows if row.error]
    figure.suptitle("; ".join([title, *failures]), fontsize=12, color=INK)
    figure.savefig(path)


def layers(path: Path, observed: Mapping[str, Sequence[Layer]]) -> None:
    """Plot gradient noise, curvature and update size by layer, one series for each observed method."""
    figure, axes = _figure(11, 4.2, 3)
    panels = (
        ("noise", "gradient noise", "batch size at which\nnoise equals signal"),
        ("curvature", "curvature", "mean of the Gauss-Newton diagonal"),
        ("update", "size of the next update", "‖ΔW‖ / ‖W‖"),
    )
    for ax, (field, title, label) in zip(axes, panels, strict=True):
        for marker, (method, own) in zip("os^", observed.items(), strict=False):
            values = [getattr(layer, field) for layer in own]
            ax.plot(range(len(own)), values, marker=marker, color=COLOURS[method], linewidth=1.6, label=method)
            ax.set_xticks(range(len(own)), [layer.name for layer in own])
        ax.tick_params(axis="x", labelsize=7.5)
        ax.set_yscale("log")
        _plain_log(ax.yaxis)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set_ylabel(label, **STYLE)
    if observed:
        axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    else:
        axes[1].text(0.5, 0.5, "no layer could be observed", transform=axes[1].transAxes, ha="center", color=INK)
    figure.suptitle("Each layer, seen from one batch after three epochs", fontsize=12, color=INK)
    figure.savefig(path)
