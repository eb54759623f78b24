"""The LocoProp authors' own learning curve, and how near other runs come to it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import probe

__all__ = ["AUTHORS_TEST", "AUTHORS_TRAIN", "Row", "plot", "summary", "tolerance"]

# Losses that the authors' program saved (full MNIST, one run): epoch -> nats an image. Epoch 0 is the start.
AUTHORS_TRAIN = {
    0: 547.24, 1: 547.24, 2: 122.69, 3: 80.72, 4: 69.61, 5: 65.24, 6: 62.85,
    8: 60.19, 10: 58.72, 12: 57.76, 14: 57.02,
}  # fmt: skip
AUTHORS_TEST = {
    2: 121.70, 3: 79.93, 4: 69.44, 5: 65.65, 6: 63.77, 8: 61.95, 10: 61.04, 12: 60.57, 14: 60.20,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One seed after one epoch (0: the start); `seconds` of training so far, without evaluation."""

    seed: int
    epoch: int
    train_loss: float | None
    test_loss: float | None
    seconds: float
    error: str = ""


def tolerance(epoch: int) -> float | None:
    """Allowed relative difference of the median train loss from the authors'; None where nothing is asked."""
    if epoch < 2 or epoch not in AUTHORS_TRAIN:
        return None
    return 0.04 if epoch == 2 else 0.02


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per epoch: the median over seeds beside the authors' value, and whether it is near enough."""
    lines = []
    failed = any(row.error for row in rows)
    for epoch in sorted({row.epoch for row in rows}):
        train_losses = [r.train_loss for r in rows if r.epoch == epoch and r.train_loss is not None]
        test_losses = [r.test_loss for r in rows if r.epoch == epoch and r.test_loss is not None]
        if not train_losses:
            continue
        median, theirs, allowed = statistics.median(train_losses), AUTHORS_TRAIN.get(epoch), tolerance(epoch)
        difference = None if theirs is None else median / theirs - 1
        near = None
        if difference is not None and allowed is not None:
            near = abs(difference) <= allowed and not failed
        lines.append({
            "epoch": epoch, "seeds": len(train_losses), "median_train_loss": median,
            "median_test_loss": statistics.median(test_losses), "authors_train_loss": theirs,
            "authors_test_loss": AUTHORS_TEST.get(epoch), "relative_difference": difference, "tolerance": allowed,
            "pass": near,
        })  # fmt: skip
    return lines


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Left: train loss by epoch beside the authors'. Right: the relative difference and what is allowed."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    ours, theirs, band = "#D55E00", "#333333", "#dddddd"
    lines = [line for line in summary(rows) if line["authors_train_loss"] is not None]
    last = max(row.epoch for row in rows)
    figure = probe.figure(10, 4.2, dpi=150)
    left, right = figure.subplots(1, 2)
    for seed in sorted({row.seed for row in rows}):
        own = [r for r in rows if r.seed == seed and r.train_loss is not None]
        label = "layerwise, each seed" if seed == rows[0].seed else None
        left.plot([r.epoch for r in own], [r.train_loss for r in own], color=ours, linewidth=1.3, label=label)
    shown = [epoch for epoch in AUTHORS_TRAIN if epoch <= last]
    left.plot(shown, [AUTHORS_TRAIN[e] for e in shown], "o", color=theirs, label="authors' program", zorder=3)
    left.set_yscale("log")
    left.yaxis.set_major_locator(FixedLocator([60, 80, 100, 150, 200, 300, 400, 550]))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylabel("train loss (nats an image, log scale)")
    left.set_title("LocoProp-M, published settings, full MNIST", loc="left", fontsize=11)
    left.legend(frameon=False)
    for line in lines:
        if line["tolerance"]:
            half, label = 100 * line["tolerance"], "allowed" if line["epoch"] == 2 else None
            right.bar(line["epoch"], 2 * half, bottom=-half, width=0.5, color=band, zorder=1, label=label)
    for row in rows:
        if row.train_loss is not None and row.epoch in AUTHORS_TRAIN:
            value = 100 * (row.train_loss / AUTHORS_TRAIN[row.epoch] - 1)
            label = "each seed" if row is rows[0] else None
            right.plot(row.epoch, value, "o", markerfacecolor="none", color=ours, zorder=2, label=label)
    medians = [100 * line["relative_difference"] for line in lines]
    at = [line["epoch"] for line in lines]
    right.plot(at, medians, "_", color=ours, ms=22, mew=2.5, zorder=3, label="median over seeds")
    right.axhline(0, color=theirs, linewidth=1)
    right.set_ylabel("difference from the authors' train loss, %")
    right.set_title("how near", loc="left", fontsize=11)
    right.legend(frameon=False)
    for ax in (left, right):
        ax.set_xlabel("epochs")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    probe.save(figure, path)
