"""Docstrings as Markdown: what is plain text in the source must not turn into markup on the page."""

from __future__ import annotations

import re

__all__ = ["as_markdown", "with_whole_heads"]

MARKUP = re.compile(r"([*_<>|\[\]])")
SPANS = re.compile(r"(`[^`]*`|\*\*[^*]+\*\*)")
COMPOUND = re.compile(r"(?<![\w-])\w+(?:-\w+)+(?![^<]*>)")
HEADS = re.compile(r"(?:Raises|Source|Units|Memory)\b")


def as_markdown(text: str, parameters: tuple[str, ...] = ()) -> str:
    """Text with Markdown's characters escaped outside of code; a paragraph for each parameter, its name in bold.

    Parameters may stand in the list of an `Args:` section, each with its further lines indented once more.
    """
    names = "|".join(map(re.escape, parameters))
    listed = re.compile(rf"(?:{names})(?:, (?:{names}))*:(?= |$)") if names else None
    lines: list[str] = []
    args = False
    for line in text.splitlines():
        if line == "Args:":
            args = True
            continue
        args = args and line.startswith("    ")
        if args:
            line = line[4:].removeprefix("    ")
        elif line.startswith("    "):
            lines.append(line)
            continue
        head = listed.match(line) if listed else None
        if (head or HEADS.match(line)) and lines and lines[-1].strip():
            lines.append("")
        bold = f"**{_escaped(head[0][:-1])}**:" if head else ""
        lines.append(bold + _plain(line[head.end() :] if head else line, listed))
    return "\n".join(lines)


def _plain(text: str, listed: re.Pattern[str] | None) -> str:
    """A line outside of code blocks: code spans stay, parameters within it are bold, the rest is escaped."""
    parts = []
    for part in SPANS.split(text):
        if part[:1] == "`" or part[:2] == "**":
            parts.append(part)
            continue
        at = 0
        for match in listed.finditer(part) if listed else ():
            if match.start() and part[match.start() - 1] != " ":
                continue
            parts += [_escaped(part[at : match.start()]), f"**{_escaped(match[0][:-1])}**:"]
            at = match.end()
        parts.append(_escaped(part[at:]))
    return "".join(parts)


def _escaped(text: str) -> str:
    return MARKUP.sub(r"\\\1", text)


def with_whole_heads(page: str) -> str:
    """The HTML of a page in which names with hyphens do not break in the heads of tables."""

    def head(match: re.Match[str]) -> str:
        return COMPOUND.sub(r'<span class="whole">\g<0></span>', match[0])

    return re.sub(r"<th\b[^>]*>.*?</th>", head, page, flags=re.DOTALL)
