"""The pages of the training studies, written from their rows each time the site is built."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks import read
from benchmarks.read import STUDIES, Study

__all__ = ["PAGES", "figures", "folder", "pages", "summary"]

OPEN, CLOSE = '<div class="numbers" markdown="1">\n\n', "\n</div>\n"  # as `tables.numbers`
ROOT = Path(__file__).resolve().parents[1]
PAGES = {f"study-{name.replace('_', '-')}": name for name in STUDIES}


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="layerwise-docs-")  # goes with the program


def folder() -> Path:
    """Where pictures lie while the site is built."""
    return Path(_temporary().name)


@cache
def _written(name: str) -> str:
    """The report of a study, its figures in a folder of its own."""
    text = read.study_report(name, folder() / name)
    text = re.sub(r"(?:^\|.*\n)+", lambda table: f"{OPEN}{table[0]}{CLOSE}", text, flags=re.MULTILINE)
    return text.replace("](", f"](files/{name}-")  # figures are the report's only links


def pages() -> Iterator[tuple[str, str]]:
    """`(path in docs/, Markdown)` of every study."""
    for page, name in PAGES.items():
        yield f"results/{page}.md", _page(STUDIES[name])


def _page(study: Study) -> str:
    option = "" if study.name == "locoprop" else f" --study {study.name}"
    how = (
        f"Made from the rows in `benchmarks/training/rows` when this page was built. Runs: "
        f"`python -m benchmarks.training{option} tune`, `final`, `step-time`; every method has the same number of "
        f"declared trials (`{study.trials.relative_to(ROOT)}`), and each run is one row."
    )
    runs = read.runs(study.name)
    held = sum(runs.values())
    if not held:
        problems = ", ".join(f"`{problem}`" for problem in study.methods)
        none = f"**Not run yet.** No row of this study is in the repository. Its problems: {problems}."
        return f"# {study.title}\n\n{none}\n\n{how}\n"
    waiting = [problem for problem, count in runs.items() if not count]
    said = f"{held} runs so far." + (f" Not run yet: {', '.join(f'`{p}`' for p in waiting)}." if waiting else "")
    head, _, rest = _written(study.name).partition("\n\n")
    return f"{head}\n\n{said}\n\n{how}\n\n{rest}"


def summary(name: str) -> str:
    """What the report of a study says of all its problems together, after its title and its rules."""
    said = _written(name).split("\n## ")[0].split("\n\n", 2)[2].strip()
    where = f"[its problems one by one](../results/study-{name}.md)"
    return f"{said}\n\n*`python -m benchmarks.training report --study {name}`; {where}.*"


def figures() -> Iterator[tuple[str, Path]]:
    """`(path in docs/, picture)` of every figure of a report."""
    for name in STUDIES:
        if any(read.runs(name).values()):
            _written(name)
            for picture in sorted((folder() / name).glob("*.png")):
                yield f"results/files/{name}-{picture.name}", picture
