"""Test error of a classifier's finals: over the first minibatches, by epoch, and for one epoch at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import probe
from benchmarks.training.figures import log_scale
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.summaries import Finals, median

__all__ = ["MARKS", "accuracy_figure"]

MARKS = {"higgs-2x300": {"samples": 1050.0, "admm": 0.64}}  # the poster's
FLOOR = 0.02  # %, where a test set without an error is drawn


def accuracy_figure(path: Path, problem: str, final: Finals) -> None:
    """Test error over the first minibatches and by epoch: a thin line a seed, a thick one for their median.

    Of one epoch the right panel has the error at its end, a dot a seed. Without early measurements it is alone.
    """
    known = PROBLEMS[problem]
    figure = probe.figure(12 if known.early else 8, 5)
    panels = figure.subplots(1, 2 if known.early else 1, squeeze=False)[0]
    first, later = panels[0] if known.early else None, panels[-1]
    ends = {m: median([_error(r["test_accuracy"]) for r in rows]) for m, rows in final.items()}
    order = sorted(final, key=ends.__getitem__)
    one = all(r["configuration"]["epochs"] == 1 for rows in final.values() for r in rows)
    for index, method in enumerate(order):
        ours = method.startswith("am-")
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--")[index // 10 % 2], "zorder": 3 if ours else 2}
        said = f"{ends[method]:.2f}" if math.isfinite(ends[method]) else "failed"
        label = f"{said}  {known.label(method)}"
        if first is not None:
            _curves(first, [r["early_curve"] for r in final[method]], 0, 2.6 if ours else 1.3, label, style)
        if one:
            errors = [e for e in (_error(r["test_accuracy"]) for r in final[method]) if math.isfinite(e)]
            later.plot(errors, [-index] * len(errors), "o", color=style["color"], label=label)
        else:
            _curves(later, [r["accuracy_curve"] for r in final[method]], 1, 2.6 if ours else 1.3, label, style)
    if first is not None:
        _marks(problem, first, () if one else (later,))
        first.set(
            xlabel=f"minibatches of {known.batch}", ylabel=f"error on the first {known.early_rows:,} test rows, %"
        )
    if one:
        later.set_yticks([-i for i in range(len(order))], [known.label(m) for m in order])
        later.set_xlabel(f"error on {known.test_rows:,} test rows after the epoch, %")
    else:
        later.xaxis.get_major_locator().set_params(integer=True)
        later.set(xlabel="epochs", ylabel=f"error on {known.test_rows:,} test rows, %")
    figure.suptitle(known.title)
    later.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), title="median at the end, %", frameon=False)
    for axes in panels:
        _scale(axes, "x" if one and axes is later else "y")
        axes.grid(alpha=0.3)
    probe.save(figure, path)


def _scale(axes: Any, way: str) -> None:
    """Logarithms, where the errors span more than a factor of four."""
    low, high = getattr(axes.dataLim, f"interval{way}")
    if high > 4 * low:
        log_scale(axes, way)


def _error(accuracy: float) -> float:
    return max(100 * (1 - accuracy), FLOOR) if 0 <= accuracy <= 1 else math.inf


def _curves(
    axes: Any, found: Sequence[Sequence[float]], start: int, width: float, label: str, style: Mapping[str, Any]
) -> None:
    """Errors from place `start` on, and their median as far as all seeds came."""
    curves = [[_error(v) for v in curve] for curve in found if len(curve) > start]
    if not curves:
        axes.plot([], [], linewidth=width, label=label, **style)
        return
    for curve in curves:
        axes.plot(range(start, len(curve)), curve[start:], linewidth=0.5, alpha=0.4, **style)
    length = min(map(len, curves))
    middle = [median([c[i] for c in curves]) for i in range(start, length)]
    axes.plot(range(start, length), middle, linewidth=width, label=label, **style)


def _marks(problem: str, first: Any, others: Sequence[Any]) -> None:
    """The poster's own figures for a problem."""
    for name, value in MARKS.get(problem, {}).items():
        if name == "samples":
            place = value / PROBLEMS[problem].batch
            first.axvline(place, color="grey", linewidth=0.8)
            first.annotate(f" {value:,.0f} samples", (place, 0.02), fontsize=8, xycoords=("data", "axes fraction"))
        else:
            for axes in (first, *others):
                axes.axhline(100 * (1 - value), color="grey", linewidth=0.8, linestyle=":")
            for axes in others:
                axes.annotate(
                    "ADMM in the poster", (0.7, 100 * (1 - value)), fontsize=8, xycoords=("axes fraction", "data")
                )
