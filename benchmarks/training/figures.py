"""Train loss by epoch and by second, a thin line a seed and a thick one for their median."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import probe

from .summaries import Row, median

__all__ = ["log_scale", "seed_figure"]


def seed_figure(path: Path, title: str, final: Mapping[str, Sequence[Row]], step_seconds: Mapping[str, float]) -> None:
    """Draw the finals; a method that has not been timed is in the left panel only."""
    figure = probe.figure(12, 5)
    by_epoch, by_second = figure.subplots(1, 2, sharey=True)
    ends = {method: median([float(r["train_loss"]) for r in rows]) for method, rows in final.items()}
    starts = [r["train_curve"][0] for rows in final.values() for r in rows if r["train_curve"]]
    for index, method in enumerate(sorted(final, key=ends.__getitem__)):
        rows = final[method]
        configuration = rows[0]["configuration"]
        steps = -(-configuration["rows"] // configuration["batch"])
        second = steps * step_seconds.get(method, math.nan)
        ours = method.startswith("locoprop")
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--")[index // 10 % 2], "zorder": 3 if ours else 2}
        curves = [r["train_curve"] for r in rows]
        length = min(map(len, curves))
        middle = [median([c[e] for c in curves]) for e in range(length)]
        label = f"{ends[method]:.4g}  {method}"
        for axes, unit, first in ((by_epoch, 1.0, 0), (by_second, second, 1)):
            if math.isnan(unit):
                continue
            for curve in curves:
                axes.plot(
                    [e * unit for e in range(first, len(curve))], curve[first:], linewidth=0.5, alpha=0.4, **style
                )
            places = [e * unit for e in range(first, length)]
            axes.plot(places, middle[first:], linewidth=3.2 if ours else 1.4, label=label, **style)
    by_epoch.set(xlabel="epochs", ylabel="train loss", title=title)
    by_second.set(xlabel="seconds (steps x measured seconds a step)", xscale="log", title="from the first epoch on")
    by_second.xaxis.set_major_formatter("{x:g}")
    by_second.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), title="final median", frameon=False)
    for axes in (by_epoch, by_second):
        axes.grid(alpha=0.3)
        log_scale(axes)
    if starts:
        by_epoch.set_ylim(top=1.05 * max(starts))
    probe.save(figure, path)


def log_scale(axes: Any, way: str = "y") -> None:
    """Logarithms along x or y, with plain numbers, several a decade: an axis may span less than one."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{way}scale": "log"})
    axis = getattr(axes, f"{way}axis")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
