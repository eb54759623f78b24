"""What pages take from the repository: `<!-- book: name argument -->` becomes a table, a list or a file's text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from book import studies, tables

__all__ = ["INSERTS", "Unknown", "filled"]

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- book: (?P<name>[\w-]+)(?: (?P<argument>[^>]+?))? -->$", flags=re.MULTILINE)


class Unknown(Exception):
    """A page asks for an insert that does not exist."""


def _listing(path: str) -> str:
    """A Python file of the repository as a block of code with its path for a title; pages show it and do not run it."""
    file = (ROOT / path).resolve()
    if not (file.is_relative_to(ROOT) and file.suffix == ".py" and file.is_file()):
        raise Unknown(f"a page asks for the listing of {path!r}, which is no Python file of the repository")
    return f'```{{ .python title="{path}" }}\n{file.read_text(encoding="utf-8").rstrip()}\n```'


INSERTS: dict[str, Callable[[str], str]] = {
    "cost": tables.cost,
    "overhead": tables.overhead,
    "slower": tables.slower,
    "overhead-machine": tables.overhead_machine,
    "overhead-rows": tables.overhead_rows,
    "ranks": tables.ranks,
    "reproduction": tables.reproduction,
    "demo-tuning": tables.demo_tuning,
    "classifiers": tables.classifiers,
    "combinations": tables.combinations,
    "character-gpt": tables.character_gpt,
    "step-times": tables.step_times,
    "study": tables.study,
    "summary": studies.summary,
    "altmin": tables.altmin,
    "listing": _listing,
}


def filled(markdown: str, page: str) -> str:
    """The page with every mark replaced."""

    def insert(match: re.Match[str]) -> str:
        make = INSERTS.get(match["name"])
        if make is None:
            raise Unknown(f"{page} asks for {match['name']!r}; there are: {', '.join(INSERTS)}")
        return make(match["argument"] or "")

    return MARK.sub(insert, markdown)
