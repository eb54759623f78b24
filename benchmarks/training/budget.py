"""What the study will take: core-hours by problem and part, from measured step times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .locoprop.ablations import ablations
from .locoprop.plan import MAIN
from .plan import Key, Row, Run, finals, methods_of, parse, tuning
from .problems import PROBLEMS
from .study import study_of

__all__ = ["ASSUMED", "OVERHEAD", "Part", "assumed", "cost", "estimate", "table", "used"]

OVERHEAD = 3.0  # seconds a run: a process, reading the data, Benchopt
ASSUMED = 3.0  # Adam's steps that a step takes of a method that has not been timed

StepTimes = Callable[[str], tuple[Mapping[str, float], float]]


@dataclass(frozen=True)
class Part:
    """A part of the study: its runs, those that have no row yet, and their hours."""

    problem: str
    phase: str
    method: str
    runs: int
    left: int
    hours: float
    hours_left: float


def cost(run: Run, step_times: StepTimes) -> float:
    """CPU seconds of a run; NaN where nothing has been timed on its problem.

    A method that has not been timed itself is taken to need ASSUMED times Adam's step.
    A changed batch or shape is taken to cost what its multiplications do, a changed T what (2 + 4 rows·T/N)/3 says.
    """
    times, losses = step_times(run.problem)
    step = times.get(run.method, ASSUMED * times.get("adam", math.nan))
    known = PROBLEMS[run.problem]
    rows = min(run.rows, known.measured or run.rows) + known.test_rows
    early = (run.early + 1) * min(1.0, known.early_rows / rows) * losses if run.early else 0.0
    return OVERHEAD + run.steps * step * _change_of_cost(run) + (run.epochs + 1) * losses + early


def _change_of_cost(run: Run) -> float:
    change, shape = parse(run.change), parse(run.shape)
    own = PROBLEMS[run.problem].batch
    factor = change.get("batch", own) / own if change.get("batch") else 1.0
    factor *= float(shape.get("width", 1.0)) ** 2
    if "steps" in change and run.method == "locoprop-m":
        factor *= max(1.0, change["steps"] / 10)
    return factor


def estimate(step_times: StepTimes, rows: Callable[[str], Mapping[Key, Row]], problems: Iterable[str]) -> list[Part]:
    """The study in parts. A final's trial is not known before tuning, and does not matter to its cost."""
    parts = []
    for problem in problems:
        held = rows(problem)
        for method in methods_of(problem):
            parts.append(_part("tune", tuning(problem, method), held, step_times))
            done = [r for r in held.values() if r["phase"] == "final" and r["method"] == method]
            planned = finals(problem, method, 0)
            parts.append(_part("final", planned, held, step_times, left=max(0, len(planned) - len(done))))
    if MAIN in problems:
        held = rows(MAIN)
        for name, by_method in ablations().items():
            for runs in by_method.values():
                if runs[0].phase == "ablation":
                    parts.append(_part(f"ablation: {name}", runs, held, step_times))
    return parts


def _part(phase: str, runs: list[Run], held: Mapping[Key, Row], step_times: StepTimes, left: int | None = None) -> Part:
    first = runs[0]
    waiting = sum(r.key() not in held for r in runs) if left is None else left
    each = cost(first, step_times)
    waiting = 0 if first.unavailable() else waiting
    return Part(
        first.problem, phase, first.method, len(runs), waiting, len(runs) * each / 3600, waiting * each / 3600
    )  # fmt: skip


def assumed(problems: Iterable[str], step_times: StepTimes) -> list[str]:
    """The methods of the study that have not been timed on a problem."""
    return [f"{m} on {p}" for p in problems for m in methods_of(p) if m not in step_times(p)[0]]


def used(rows: Iterable[Row]) -> float:
    """Core-hours that the rows took, by their own clocks."""
    return math.fsum(float(r["clock"].get("run_cpu_seconds", 0.0)) for r in rows) / 3600


def table(parts: list[Part], assumed: Sequence[str] = (), used: float = 0.0, in_full: bool = False) -> str:
    """The estimate as text. assumed: methods by problem that are counted without having been timed."""
    lines = [f"{'problem':24}{'part':32}{'runs':>6}{'left':>6}{'hours':>8}{'left':>8}"]
    for problem in dict.fromkeys(p.problem for p in parts):
        phases = dict.fromkeys(p.phase for p in parts if p.problem == problem)
        for phase in phases:
            chosen = [p for p in parts if (p.problem, p.phase) == (problem, phase)]
            lines.append(_line(problem, phase, chosen))
            if in_full:
                lines += [_line("", f"  {p.method}", [p]) for p in chosen]
        cut = study_of(problem).cut(problem)
        if cut:
            lines.append(f"    left out for their cost: {', '.join(cut)}")
    lines.append(_line("all", "", parts))
    if assumed:
        lines.append(f"not timed, taken as {ASSUMED:g} of Adam's steps: {', '.join(assumed)}")
    unknown = sorted({p.problem for p in parts if math.isnan(p.hours)})
    if unknown:
        lines.append(f"nothing timed, not counted: {', '.join(unknown)}")
    total = sum(p.hours for p in parts if not math.isnan(p.hours))
    least = "at least " if unknown else ""
    allowed = sum({(s := study_of(p.problem)).name: s.budget for p in parts}.values())
    verdict = "OVER" if total > allowed else "within" if not unknown else "not yet over"
    lines.append(f"the rows so far took {used:.2f} core-hours")
    lines.append(f"{least}{total:.2f} core-hours in all, {verdict} the budget of {allowed:g}")
    return "\n".join(lines)


def _line(problem: str, phase: str, parts: list[Part]) -> str:
    hours = math.fsum(p.hours for p in parts if not math.isnan(p.hours))
    left = math.fsum(p.hours_left for p in parts if not math.isnan(p.hours))
    return (
        f"{problem:24}{phase:32}{sum(p.runs for p in parts):>6}{sum(p.left for p in parts):>6}{hours:>8.2f}{left:>8.2f}"
    )
