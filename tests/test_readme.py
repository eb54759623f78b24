"""The README's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
LINKS = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_snippet_runs(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, snippet {number}", "exec"), {})


def test_readme_shows_the_three_uses() -> None:
    assert len(BLOCKS) >= 3
    assert all(any(name in block for block in BLOCKS) for name in ("lw.observe", "lw.LocoProp", "lw.AltMin"))


@pytest.mark.parametrize("link", LINKS)
def test_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()
