"""Train loss by epoch and by second, a thin line a seed and a thick one for their median."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .summaries import median

__all__ = ["seed_figure"]

Row = Mapping[str, Any]


def seed_figure(path: Path, title: str, final: Mapping[str, Sequence[Row]], step_seconds: Mapping[str, float]) -> None:
    """Draw the finals; a method that has not been timed is in the left panel only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_epoch, by_second = figure.subplots(1, 2, sharey=True)
    for number, (method, rows) in enumerate(final.items()):
        configuration = rows[0]["configuration"]
        steps = -(-configuration["rows"] // configuration["batch"])
        second = steps * step_seconds.get(method, math.nan)
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10 % 2]}
        curves = [r["train_curve"] for r in rows]
        length = min(map(len, curves))
        middle = [median([c[e] for c in curves]) for e in range(length)]
        for axes, unit in ((by_epoch, 1.0), (by_second, second)):
            if math.isnan(unit):
                continue
            for curve in curves:
                axes.plot([e * unit for e in range(len(curve))], curve, linewidth=0.5, alpha=0.6, **style)
            axes.plot([e * unit for e in range(length)], middle, linewidth=1.8, label=method, **style)
    by_epoch.set(xlabel="epochs", ylabel="train loss", yscale="log", title=title)
    by_second.set(xlabel="seconds (steps x measured seconds a step)", xscale="symlog")
    by_epoch.legend(fontsize=7)
    for axes in (by_epoch, by_second):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
