"""What others read of the benchmarks: results by name, and what the reports say and draw of them. Nothing is run.

The pages of docs/ are made from this module alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import probe
from benchmarks.distributed import gpt, kfac, layers, scaling
from benchmarks.speed.overhead.contenders import CONTENDERS
from benchmarks.speed.overhead.nets import NETS
from benchmarks.speed.overhead.report import best_peer, chart, slower
from benchmarks.training import report, step_time
from benchmarks.training.locoprop import classifiers as image_classifiers
from benchmarks.training.locoprop.character_gpt import EVERY, SECONDS, summary
from benchmarks.training.locoprop.combinations import chosen
from benchmarks.training.rows import FOLDER, Rows
from benchmarks.training.rows import read as read_rows
from benchmarks.training.study import STUDIES, Study
from benchmarks.training.summaries import interval

__all__ = [
    "LIBRARIES", "NETS", "STUDIES", "Cell", "Study", "best_peer", "character_gpt", "chart",
    "chosen", "classifiers", "finals", "interval", "overhead", "picture", "ranks",
    "result", "runs", "slower", "step_times", "study_report",
]  # fmt: skip

Cell = Mapping[str, Any]
LIBRARIES = {name: known.label for name, known in CONTENDERS.items()}  # names as they are printed


def result(name: str) -> Any:
    """What `results/<name>.json` holds; `altmin/depth` is one of a folder. Raises FileNotFoundError."""
    return _held(probe.RESULTS / f"{name}.json")


@cache
def _held(path: Path) -> Any:
    return probe.read(path)


def picture(name: str) -> Path | None:
    """The picture of a result, where there is one."""
    path = probe.RESULTS / f"{name}.png"
    return path if path.is_file() else None


def overhead(net: str | None = None) -> dict[str, Cell]:
    """The cells `<net>/<quantity>` of the costs, of all nets or of one."""
    return {name: cell for name, cell in result("overhead")["cells"].items() if net in (None, name.split("/")[0])}


def ranks(name: str) -> str:
    """The report, in Markdown, of a benchmark over ranks: layers, kfac, gpt_(10M, 10M-hidden or small), scaling."""
    found = result(f"distributed_{name}")
    if name == "layers":
        return layers.report(found["layers"], found["stages"], found["ranks"])
    if name == "kfac":
        return kfac.report(found["arms"])
    return gpt.report(found) if name.startswith("gpt") else scaling.report(found)


# -- studies ------------------------------------------------------------------------------------------------------


def runs(study: str) -> dict[str, int]:
    """How many finished runs there are of each problem of a study."""
    return {problem: len(Rows(FOLDER).load(problem)) for problem in STUDIES[study].methods}


def finals(study: str) -> int:
    """On how many problems of a study there are final runs."""
    held = (Rows(FOLDER).load(problem).values() for problem in STUDIES[study].methods)
    return sum(any(row["phase"] == "final" for row in rows) for rows in held)


def character_gpt() -> tuple[int, list[dict[str, Any]], float, float]:
    """The character GPT's runs: tokens that all have seen, a line for each method, and the seconds between measurements
    and of a run."""
    return *summary(result("character_gpt")), EVERY, SECONDS


def classifiers(problem: str) -> tuple[dict[str, list[dict[str, Any]]], Mapping[str, float], float]:
    """The image classifiers' runs on a problem: those of each method's best rate, seconds of a step of each in an
    interleaved run, and seconds of a run."""
    found = [row for row in result("classifiers") if row["problem"] == problem]
    prices: Mapping[str, float] = result("classifiers_prices")[problem]["seconds a step"]
    return chosen(found, image_classifiers.end), prices, image_classifiers.PILOTS[problem].seconds


def study_report(study: str, folder: Path) -> str:
    """The report of a study in Markdown, its figures written to a folder."""
    return report.write(Rows(FOLDER), list(STUDIES[study].methods), folder=folder)


def step_times() -> dict[str, tuple[dict[str, float], int]]:
    """By problem: each method's seconds a step over Adam's, and with how many threads they were last timed."""
    found = {}
    for problem, threads in {row["problem"]: row["threads"] for row in read_rows(step_time.FILE)}.items():
        seconds = step_time.measured(problem)[0]
        found[problem] = {method: each / seconds[step_time.REFERENCE] for method, each in seconds.items()}, threads
    return found
