"""Pictures on pages: drawings go into the page, so that they follow its colours; others are copied beside it."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

__all__ = ["COPIES", "outside", "with_drawings", "with_outside", "with_pipes"]

IMAGE = re.compile(r"^!\[(?P<alt>[^\]]*)\]\((?P<link>[^)#]+)\)[ ]*$", flags=re.MULTILINE)
COPIES = "results/files"  # where the site has its copies of pictures that lie outside of docs/


def _target(page: str, link: str) -> str:
    """The path that a link of a page leads to, from the folder docs/; it begins with `..` where it leaves that."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def outside(markdown: str, page: str) -> list[str]:
    """The pictures that a page takes from outside of docs/, as paths from there."""
    found = [_target(page, match["link"]) for match in IMAGE.finditer(markdown) if "://" not in match["link"]]
    return [path for path in found if path.startswith("..")]


def with_outside(markdown: str, page: str) -> str:
    """The page with such pictures taken from the site's copies."""

    def moved(match: re.Match[str]) -> str:
        target = _target(page, match["link"])
        if "://" in match["link"] or not target.startswith(".."):
            return match[0]
        copy = posixpath.relpath(f"{COPIES}/{posixpath.basename(target)}", posixpath.dirname(page) or ".")
        return f"![{match['alt']}]({copy}){{ loading=lazy }}"

    return IMAGE.sub(moved, markdown)


def with_drawings(markdown: str, page: str, docs: Path) -> str:
    """The page with its SVG drawings in place of their links, without their own colours."""

    def drawn(match: re.Match[str]) -> str:
        path = docs / _target(page, match["link"])
        if path.suffix != ".svg" or not path.is_file():
            return match[0]
        text = re.sub(r"<style>.*?</style>\s*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = re.sub(r"\n\s*", "", text)
        label = html.escape(match["alt"], quote=True)
        return f'\n<figure class="drawing" role="img" aria-label="{label}">{text}</figure>\n'

    return IMAGE.sub(drawn, markdown)


def with_pipes(markdown: str) -> str:
    r"""The page with `\|` in the code of its tables as a plain bar, which MkDocs, other than GitHub, wants there."""
    lines = markdown.split("\n")
    for number, line in enumerate(lines):
        if line.startswith("|") and "\\|" in line:
            lines[number] = re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line)
    return "\n".join(lines)
