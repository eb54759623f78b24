"""The Python of README and docs runs as it stands, and the README's links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = [
    (page, block)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
]
LINKS = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_snippet_runs(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, snippet {number}", "exec"), {})


@pytest.mark.parametrize(("page", "block"), PAGES)
def test_snippet_of_the_docs_runs(page: Path, block: str) -> None:
    exec(compile(block, page.name, "exec"), {})


def test_readme_shows_the_three_uses() -> None:
    assert all(any(name in block for block in BLOCKS) for name in ("lw.observe", "lw.LocoProp", "lw.AltMin"))


@pytest.mark.parametrize("link", LINKS)
def test_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()
