"""What pages take from elsewhere in the repository: `<!-- book: name argument -->` becomes a table, a list or code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from book import studies, tables

__all__ = ["INSERTS", "Unknown", "filled"]

MARK = re.compile(r"^<!-- book: (?P<name>[\w-]+)(?: (?P<argument>[^>]+?))? -->$", flags=re.MULTILINE)


class Unknown(Exception):
    """A page asks for an insert that does not exist."""


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> str:
    """A program of examples/ in full. It is shown, not run: its own test runs it."""
    path = EXAMPLES / f"{name}.py"
    if not path.is_file():
        raise Unknown(f"there is no examples/{name}.py")
    return f'```{{ .python title="examples/{path.name}" }}\n{path.read_text(encoding="utf-8").rstrip()}\n```'


INSERTS: dict[str, Callable[[str], str]] = {
    "cost": tables.cost,
    "overhead": tables.overhead,
    "slower": tables.slower,
    "overhead-machine": tables.overhead_machine,
    "ranks": tables.ranks,
    "reproduction": tables.reproduction,
    "demo-tuning": tables.demo_tuning,
    "step-times": tables.step_times,
    "study": tables.study,
    "summary": studies.summary,
    "altmin": tables.altmin,
    "example": example,
}


def filled(markdown: str, page: str) -> str:
    """The page with every mark replaced."""

    def insert(match: re.Match[str]) -> str:
        make = INSERTS.get(match["name"])
        if make is None:
            raise Unknown(f"{page} asks for {match['name']!r}; there are: {', '.join(INSERTS)}")
        return make(match["argument"] or "")

    return MARK.sub(insert, markdown)
