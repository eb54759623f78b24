"""`docs/calls.md`: what the library gives for every function and module of torch, as the tests found it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from calls_measured import Found

__all__ = ["PAGE", "render"]

PAGE = Path(__file__).parents[1] / "docs" / "calls.md"

_INTRO = """\
# Every call of torch

What comes of each function of `torch`, `torch.nn.functional`, `torch.linalg`, `torch.special` and `torch.fft`, of each
module of `torch.nn` and each optimizer of `torch.optim` in torch 2.13, where a parameter is among what it reads: one
small call each, its per-sample gradients compared with a loop over the samples in float64 at a relative error of at
most 1e-10. A loss was also asked for the diagonal of its Gauss-Newton matrix. A call of parameters alone makes a tensor
that a layer may read, so that it is exact whatever it is. Names of a later torch fail the tests until they stand here.

This page is written by the tests (`make support`). A name that ends in `_` writes in place.
"""

_KINDS = {
    "exact": "Exact",
    "exact, slower": "Exact, by one vector-Jacobian product a sample (`SlowPath` says so)",
    "refused": "Refused",
    "no gradient": "No gradient: torch gives none for what it returns",
    "nothing to ask": "No parameter enters",
}


def render(found: Mapping[str, Mapping[str, Found]]) -> str:
    """The page, from what was found by namespace and name."""
    parts = [_INTRO]
    for space, names in found.items():
        parts.append(f"## {space}\n")
        for kind, title in _KINDS.items():
            reasons: dict[str, list[str]] = {}
            for name, one in names.items():
                if one.kind == kind:
                    reasons.setdefault(_reason(one.why), []).append(f"`{name}`")
            if reasons:
                parts.append(f"**{title}**\n")
            for why, those in reasons.items():
                parts.append(_line(why, those))
            parts += [""] if reasons else []
    return "\n".join(part.rstrip("\n") + "\n" if part.endswith("\n") else part for part in parts).rstrip() + "\n"


def _line(why: str, names: Iterable[str]) -> str:
    text = f"- {why + ': ' if why else ''}{', '.join(names)}"
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _reason(why: str) -> str:
    """A reason without the names and numbers of one program: the error's type, and what it says first."""
    found = re.match(r"(curvature refused, |)(\w+): (.*)", why, re.DOTALL)
    if found is None:
        return why
    start, error, text = found.groups()
    says = "it makes a sparse tensor" if "makes a sparse tensor" in text else "it returns several tensors"
    return f"{start}`{error}`" + (f", {says}" if error == "UnsupportedCall" else "")
