"""The table of docs/ecosystem.md: each configuration, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from ecosystem.adapters import PEFT
from ecosystem.base import Configuration
from ecosystem.checks import COLUMNS, Cell
from ecosystem.images import DIFFUSERS, TIMM, VISION
from ecosystem.language import CAUSAL, EXPERTS, MASKED, SEQ2SEQ
from ecosystem.others import FLOWS, GRAPHS, KOLMOGOROV, OPERATORS, SPIKING

__all__ = ["CONFIGURATIONS", "PAGE", "render"]

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
CONFIGURATIONS: Sequence[Configuration] = [
    *CAUSAL,
    *EXPERTS,
    *MASKED,
    *SEQ2SEQ,
    *VISION,
    *TIMM,
    *PEFT,
    *DIFFUSERS,
    *GRAPHS,
    *FLOWS,
    *SPIKING,
    *KOLMOGOROV,
    *OPERATORS,
]

_INTRO = """\
# With other packages

What the library gives on small models of {packages} packages, {count} configurations with random weights:
per-sample gradients, squared norms and the variance against a loop that runs each sample by itself; `DiagGGN` and a
product with the GGN against JᵀHJ from a backward pass for each output element; a product with the Hessian against the
gradient's own derivative. All in float64, also where a model asks for float32 on the way; to a relative error of
{rel:g}.

✓ is equal, ✗ a typed error for the reason in the note; nothing else came out. In an empty cell the model makes its log
density by itself, and where it ends and the loss begins is a choice. Models are in evaluation, where they do not say
otherwise.

This page is written by `pytest tests/test_ecosystem.py --write-support` where the packages of
`requirements/ecosystem.txt` and `requirements/timm.txt` are installed.
"""


def render(outcome: Callable[[Configuration, str], Cell], rel: float) -> str:
    """The page."""
    notes: dict[str, int] = {}
    body: list[str] = []
    for package, group in groupby(CONFIGURATIONS, lambda c: c.package):
        heading = f"## {package} {version(package)}"
        if heading not in body:
            titles = " | ".join(f"`{column}`" for column in COLUMNS)
            body += ["", heading, "", f"| configuration | {titles} |", "|---|" + ":-:|" * len(COLUMNS)]
        for c in group:
            marks = " | ".join(_mark(outcome(c, column), notes) for column in COLUMNS)
            body.append(f"| {c.name} | {marks} |")
    packages = len({c.package for c in CONFIGURATIONS})
    intro = _INTRO.format(packages=packages, count=len(CONFIGURATIONS), rel=rel)
    listed = [f"{number}. {why}" for why, number in notes.items()]
    return "\n".join([intro.rstrip(), *body, "", "## Why some are refused", "", *listed]) + "\n"


def _mark(cell: Cell, notes: dict[str, int]) -> str:
    if cell.kind != "refused":
        return {"exact": "✓", "n/a": ""}[cell.kind]
    return f"✗<sup>{notes.setdefault(cell.why, len(notes) + 1)}</sup>"
