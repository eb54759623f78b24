"""The report: tables and figures from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.probe import table

from . import step_time
from .locoprop.ablations import ablations
from .methods import METHODS
from .plan import Run, best, methods_of, tuning
from .problems import PROBLEMS
from .rows import Rows
from .study import study_of
from .summaries import Finals, Row, epochs_to, interval, median, memory, number, seeds, target
from .trials import POINTS

__all__ = ["ablation_table", "finals_of", "problem_table", "tuning_table", "write"]

Parts = Callable[[str, Mapping[Any, Row], Finals, Mapping[str, float], Path], list[str]]


def finals_of(problem: str, rows: Iterable[Row]) -> Finals:
    """Final rows by method, of the present code, in the order of METHODS."""
    found: dict[str, list[Row]] = {}
    for method in METHODS:
        mine = [
            r for r in rows
            if r["phase"] == "final" and r["problem"] == problem and r["method"] == method and _is_present(r)
        ]  # fmt: skip
        if mine:
            found[method] = sorted(mine, key=lambda r: r["seed"])
    return found


def _is_present(row: Row) -> bool:
    kept = row["configuration"]
    run = Run("", row["problem"], row["method"], row["trial"], row["seed"], kept["epochs"], kept["rows"],
              early=kept.get("early", 0))  # fmt: skip
    return row["code"] == run.code() and row["config"] == run.key()[4]


def seconds_per_epoch(row: Row, step_seconds: Mapping[str, float]) -> float:
    """Steps of an epoch times the method's measured seconds a step."""
    configuration = row["configuration"]
    steps = -(-configuration["rows"] // configuration["batch"])
    return float(steps * step_seconds.get(row["method"], math.nan))


def problem_table(problem: str, final: Finals, step_seconds: Mapping[str, float]) -> str:
    """Final losses, time to the target, step and memory of each method, as Markdown."""
    baselines = [m for m in final if METHODS[m].first_order]
    name, level = target(final, baselines)
    adam = step_seconds.get(step_time.REFERENCE, math.nan)
    said = f"Target: train loss {number(level)}, the final median of {name or 'no first-order method yet'}."
    head = (
        "method", "trial", "batch", "seeds", "train loss [95 %]", "test loss [95 %]", "epochs to target",
        "seconds to target", "step / Adam's at its batch", "MB",
    )  # fmt: skip
    rows = []
    for method, mine in final.items():
        first = mine[0]
        epochs = median([epochs_to(r, level) for r in mine]) if math.isfinite(level) else math.nan
        rows.append([
            method, first["trial"], first["configuration"]["batch"], seeds(mine),
            *(_spread([r[loss] for r in mine]) for loss in ("train_loss", "test_loss")), number(epochs),
            number(epochs * seconds_per_epoch(first, step_seconds)),
            number(step_seconds.get(method, math.nan) / adam), memory(mine),
        ])  # fmt: skip
    return f"{said}\n\n{table(head, rows, numbers=False)}"


def tuning_table(problem: str, rows: Mapping[Any, Row]) -> str:
    """Every trial's train loss by method, the best in bold, failures as infinite."""
    lines = []
    for method in methods_of(problem, METHODS):
        runs = tuning(problem, method)
        losses = [float(rows[r.key()]["train_loss"]) if r.key() in rows else math.nan for r in runs]
        if not all(map(math.isnan, losses)):
            low = min((v for v in losses if math.isfinite(v)), default=math.nan)
            lines.append([method, *(f"**{number(v)}**" if v == low else number(v) for v in losses)])
    trials = PROBLEMS[problem].trials or POINTS
    return table(["method", *map(str, range(trials))], lines, numbers=False)


def ablation_table(rows: Mapping[Any, Row]) -> str:
    """The best trial's train loss after tuning, by ablation and method, with how many trials failed."""
    lines: list[list[Any]] = []
    for name, by_method in ablations().items():
        for method, runs in by_method.items():
            done = [rows[r.key()] for r in runs if r.key() in rows]
            if len(done) < len(runs):
                if done:
                    lines.append([name, method, f"{len(done)} of {len(runs)} trials run", *3 * [""]])
                continue
            trial = best(runs, rows)
            failed = sum(r["status"] == "failed" for r in done)
            if trial is None:
                lines.append([name, method, "-", "inf", "inf", failed])
                continue
            row = rows[runs[trial].key()]
            lines.append([name, method, trial, number(row["train_loss"]), number(row["test_loss"]), failed])
    return table(("ablation", "method", "trial", "train loss", "test loss", "failed"), lines, numbers=False)


def write(rows: Rows, problems: Sequence[str], times: Path = step_time.FILE, folder: Path | None = None) -> str:
    """Write report.md and a figure a problem of one study; the text."""
    study = study_of(problems[0])
    folder = folder or study.results
    folder.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.training report" + ("" if study.name == "locoprop" else f" --study {study.name}")
    parts = [f"# {study.title}\n\nWritten by `{command}` from the rows. {_RULES[study.name]}"]
    held = {p: found for p in problems if (found := rows.load(p))}
    finals = {p: finals_of(p, found.values()) for p, found in held.items()}
    seconds = {p: step_time.measured(p, times)[0] for p in held}
    ended = {p: final for p, final in finals.items() if final}
    if ended and study.name in _SUMMARIES:
        parts.append(_SUMMARIES[study.name](ended, seconds))
    for p, found in held.items():
        parts += [f"## {PROBLEMS[p].title}", *_PARTS[study.name](p, found, finals[p], seconds[p], folder)]
        if study.cut(p):
            parts.append(f"Left out for their cost: {', '.join(study.cut(p))}.")
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


_RULES = {
    "locoprop": "Finals: 20 epochs, 3 seeds, a constant rate. Seconds are steps times the seconds a step of the "
    "interleaved run; intervals are bootstrapped over seeds.",
    "altmin": "Trials are chosen by accuracy on training rows held out; finals train on all training rows, 3 seeds. "
    "Accuracy in percent on test rows: all of them by epoch, the first 1,000 after each of the first 100 minibatches "
    "of the problem's batch (pixel by pixel: 500, and 40). Step times are of the interleaved run; intervals are "
    "bootstrapped over seeds.",
    "second-order": "Trials are chosen by accuracy on training rows held out, without classes by train loss; finals "
    "train on all training rows, 5 seeds, a constant rate. Preconditioners make the plain update "
    "`θ ← θ − lr (C + λI)⁻¹ ∇L`, but for `kfac-momentum`, the library's K-FAC with its momentum and clipped steps. "
    "Seconds are steps times the seconds a step of the interleaved run.",
}


def _accuracies(finals: Mapping[str, Finals], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """The one table of AltMin's study, and what was aimed at."""
    from .altmin.aims import aims_table
    from .altmin.report import summary_table

    said = "Accuracy in percent after epoch 1 and after the last, means over seeds; `adam` on signs is STE-Adam."
    return f"{said}\n\n{summary_table(finals)}\n\nWhat was aimed at, and reached:\n\n{aims_table(finals)}"


def _curves(finals: Mapping[str, Finals], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """The two tables of the second-order study: how fast the methods fit, and what they know of other rows."""
    from .curvature.report import fit_table, generalization_table

    fit = (
        "Train loss at the end; in brackets the time to the lower of the ends of momentum and Adam, as a multiple of "
        "that method's own time (-: never)."
    )
    test = "Error on test rows at the end in percent; on the autoencoder and the transformer the test loss."
    return f"Medians over seeds. {fit}\n\n{fit_table(finals, seconds)}\n\n{test}\n\n{generalization_table(finals)}"


_SUMMARIES = {"altmin": _accuracies, "second-order": _curves}


def _of_loss(
    problem: str, held: Mapping[Any, Row], final: Finals, step_seconds: Mapping[str, float], folder: Path
) -> list[str]:
    """The parts on a problem of LocoProp's study."""
    from .figures import seed_figure

    parts = []
    if final:
        parts.append(problem_table(problem, final, step_seconds))
        figure = folder / f"{problem}.png"
        seed_figure(figure, PROBLEMS[problem].title, final, step_seconds)
        parts.append(f"![train loss by epoch and by second]({figure.name})")
        parts += _by_epoch(final, "locoprop-m", "locoprop-m-all-rows")
    parts.append("Trials: train loss after tuning.\n\n" + tuning_table(problem, held))
    if any(r["phase"] == "ablation" for r in held.values()):
        parts.append("### Ablations, each tuned by the same trials\n\n" + ablation_table(held))
    return parts


def _by_epoch(final: Finals, method: str, other: str) -> list[str]:
    """How much higher or lower the median train loss of one method is than another's, over the epochs."""
    if method not in final or other not in final:
        return []
    one, two = ([r["train_curve"] for r in final[m]] for m in (method, other))
    length = min(map(len, [*one, *two]))
    more = [100 * (median([c[e] for c in one]) / median([c[e] for c in two]) - 1) for e in range(1, length)]
    mean = math.fsum(more) / len(more)
    return [
        f"Median train loss of {method} above {other}'s, by epoch: {min(more):.1f} to {max(more):.1f} %, "
        f"{mean:.1f} % on average, {more[-1]:.1f} % at the end."
    ]


def _of_accuracy(
    problem: str, held: Mapping[Any, Row], final: Finals, step_seconds: Mapping[str, float], folder: Path
) -> list[str]:
    """The parts on a classifier."""
    from .altmin import report as classes
    from .altmin.figures import accuracy_figure

    parts = []
    if final:
        parts.append(classes.accuracy_table(problem, final, step_seconds))
        figure = folder / f"{problem}.png"
        accuracy_figure(figure, problem, final)
        shown = "over the first minibatches and by epoch" if PROBLEMS[problem].early else "by epoch"
        parts.append(f"![test error {shown}]({figure.name})")
    parts.append("Trials: accuracy on held-out training rows.\n\n" + classes.tuning_table(problem, held))
    missing = classes.unavailable(problem)
    return [*parts, "Not run: " + "; ".join(missing) + "."] if missing else parts


def _of_curves(
    problem: str, held: Mapping[Any, Row], final: Finals, step_seconds: Mapping[str, float], folder: Path
) -> list[str]:
    """The parts on a problem of the second-order study."""
    from .altmin import report as classes
    from .curvature.report import curves_figure, curves_table

    parts = []
    if final:
        parts.append(curves_table(problem, final, step_seconds))
        figure = folder / f"{problem}.png"
        curves_figure(figure, problem, final, step_seconds)
        parts.append(f"![loss and error by epoch and by second]({figure.name})")
    if PROBLEMS[problem].classes:
        parts.append("Trials: accuracy on held-out training rows.\n\n" + classes.tuning_table(problem, held))
    else:
        parts.append("Trials: train loss after tuning.\n\n" + tuning_table(problem, held))
    missing = classes.unavailable(problem)
    return [*parts, "Not run: " + "; ".join(missing) + "."] if missing else parts


_PARTS: dict[str, Parts] = {"locoprop": _of_loss, "altmin": _of_accuracy, "second-order": _of_curves}


def _spread(values: Sequence[float]) -> str:
    mean, low, high = interval([float(v) for v in values])
    return f"{number(mean)} [{number(low)}, {number(high)}]" if math.isfinite(mean) else number(mean)
