"""What the report says of the second-order study: the paper's curves, with quartiles over seeds, and one table each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import probe
from benchmarks.training.figures import log_scale
from benchmarks.training.methods import METHODS
from benchmarks.training.problems import PROBLEMS
from benchmarks.training.summaries import Finals, by_problem, epochs_to, median, memory, number, seeds, target

__all__ = ["curves_figure", "curves_table", "fit_table", "generalization_table", "quartiles"]

LOSSES = ("train_loss", "test_loss")
REFERENCE = "adam"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, by straight lines between order statistics, some of them infinite."""
    if not values:
        return (math.nan,) * 3
    ordered = sorted(values)

    def at(part: float) -> float:
        index, weight = divmod(part * (len(ordered) - 1), 1)
        below = ordered[int(index)]  # nothing is added to it at weight 0, where the next may be infinite
        return (1 - weight) * below + weight * ordered[int(index) + 1] if weight else below

    return at(0.25), at(0.5), at(0.75)


def fit_table(finals: Mapping[str, Finals], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Median train loss at the end by method and problem, and in brackets the time to the final median of the best
    first-order method, over that method's own time, as Markdown.
    """

    def cell(problem: str, method: str) -> str:
        final = finals[problem]
        best, level = target(final, [m for m in final if METHODS[m].first_order])
        own = {m: seconds[problem].get(m, math.nan) for m in (best, method)}
        epochs = median([epochs_to(r, level) for r in final[method]])
        whole = len(final[best][0]["train_curve"]) - 1 if best else math.nan
        time = number(epochs / whole * own[method] / own[best], 2) if math.isfinite(epochs) else "-"
        return f"{_or_failed(median([r['train_loss'] for r in final[method]]))} ({time})"

    return by_problem(finals, cell)


def generalization_table(finals: Mapping[str, Finals]) -> str:
    """Median error on test rows in percent at the end by method and problem, or test loss, as Markdown."""

    def cell(problem: str, method: str) -> str:
        rows = finals[problem][method]
        if PROBLEMS[problem].classes:
            return _or_failed(median([100 * (1 - r["test_accuracy"]) for r in rows]))
        return _or_failed(median([r["test_loss"] for r in rows]))

    return by_problem(finals, cell)


def curves_table(problem: str, final: Finals, seconds: Mapping[str, float]) -> str:
    """Losses and accuracy at the end, median and quartiles over seeds, and what a step costs, as Markdown."""
    classes = PROBLEMS[problem].classes
    accuracy = ["accuracy, % [quartiles]"] if classes else []
    head = ["method", "trial", "seeds", "train loss [quartiles]", "test loss [quartiles]", *accuracy]
    lines = []
    step = seconds.get(REFERENCE, math.nan)
    for method, rows in final.items():
        cells = [method, rows[0]["trial"], seeds(rows), *(_spread([r[of] for r in rows]) for of in LOSSES)]
        if classes:
            cells.append(_spread([100 * r["test_accuracy"] for r in rows]))
        lines.append([*cells, number(seconds.get(method, math.nan) / step), memory(rows)])
    return probe.table([*head, "step / Adam's", "MB"], lines, numbers=False)


def curves_figure(path: Path, problem: str, final: Finals, seconds: Mapping[str, float]) -> None:
    """Loss, and where there are classes error, by epoch and by second from the first epoch on: medians, with bands
    from quartile to quartile. What is over twice the start is beyond the edge. A method that has not been timed is in
    the left panels only.
    """
    known = PROBLEMS[problem]
    rows = 2 if known.classes else 1
    figure = probe.figure(12, 4.2 * rows)
    panels = figure.subplots(rows, 2, squeeze=False, sharey="row")
    kinds: list[tuple[str, str, Callable[[float], float]]] = [("train_curve", "train loss", float)]
    if known.classes:
        kinds.append(("accuracy_curve", "error on test rows, %", lambda v: 100 * (1 - v)))
    for (curve, label, unit), (by_epoch, by_second) in zip(kinds, panels, strict=True):
        seen: list[float] = []
        for index, (method, runs) in enumerate(final.items()):
            configuration = runs[0]["configuration"]
            second = -(-configuration["rows"] // configuration["batch"]) * seconds.get(method, math.nan)
            epochs = range(1, max(len(r[curve]) for r in runs))
            bands = [quartiles([unit(r[curve][e]) if e < len(r[curve]) else math.inf for r in runs]) for e in epochs]
            low, middle, high = zip(*bands, strict=True) if bands else ((), (), ())
            end = f"{_or_failed(middle[-1])}  {method}" if bands else ""
            seen += [v for band in bands for v in band if v <= 2 * unit(runs[0][curve][0])]
            for axes, each in ((by_epoch, 1.0), (by_second, second)):
                if bands and not math.isnan(each):
                    places = [e * each for e in epochs]
                    axes.plot(places, middle, color=f"C{index % 10}", linewidth=1.8, label=end)
                    axes.fill_between(places, low, high, color=f"C{index % 10}", alpha=0.2, linewidth=0)
        by_epoch.set_ylabel(label)
        by_epoch.xaxis.get_major_locator().set_params(integer=True)
        by_second.legend(*by_epoch.get_legend_handles_labels(), fontsize=8, loc="center left", title="final median",
                         bbox_to_anchor=(1.01, 0.5), frameon=False)  # fmt: skip
        if seen:
            margin = max((max(seen) / min(seen)) ** 0.05, 1.001)  # all may be the same
            by_epoch.set_ylim(min(seen) / margin, max(seen) * margin)
        log_scale(by_epoch)
        log_scale(by_second, "x")
        for axes in (by_epoch, by_second):
            axes.grid(alpha=0.3)
    figure.suptitle(known.title)
    panels[-1][0].set_xlabel("epochs")
    panels[-1][1].set_xlabel("seconds (steps x measured seconds a step)")
    probe.save(figure, path)


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (_or_failed(v) for v in quartiles([float(v) for v in values]))
    return middle if middle == "failed" else f"{middle} [{low}, {high}]"


def _or_failed(value: float) -> str:
    return "failed" if math.isinf(value) else number(value)
