"""A few shapes in SVG, by classes of colour: ink and soft, in (came in), out (went out), back (came back), code."""

from __future__ import annotations

import html
import math

__all__ = ["Sketch"]

# For readers of the file itself; on the site the page's own colours take their place.
LIGHT = {"ink": "#22272e", "soft": "#6b7480", "line": "#b9c0c9", "fill": "#f4f6f8", "in": "#1f6fb2", "out": "#2e7d4f",
         "back": "#b4531a", "code": "#6f42a8", "in-fill": "#dcebf8", "out-fill": "#dcf2e4", "back-fill": "#fbe6d8",
         "code-fill": "#ebe2f7", "paper": "#ffffff"}  # fmt: skip
DARK = {"ink": "#e6eaf0", "soft": "#a0a9b5", "line": "#59636f", "fill": "#2a313b", "in": "#7db8ee", "out": "#7fd1a0",
        "back": "#f0a36b", "code": "#c5a8f0", "in-fill": "#1f3a55", "out-fill": "#1e4030", "back-fill": "#4d3120",
        "code-fill": "#3a2d55", "paper": "#1c2128"}  # fmt: skip
KINDS = ("in", "out", "back", "code")


def _rules(colours: dict[str, str]) -> str:
    rules = [
        f".paper{{fill:{colours['paper']}}}text{{fill:{colours['ink']}}}text.soft{{fill:{colours['soft']}}}",
        f".line{{stroke:{colours['ink']};fill:none}}.line.soft{{stroke:{colours['line']}}}",
        f".head{{fill:{colours['ink']}}}.head.soft{{fill:{colours['line']}}}",
        f".box{{fill:{colours['fill']};stroke:{colours['line']}}}",
    ]
    for kind in KINDS:
        rules.append(
            f"text.{kind}{{fill:{colours[kind]}}}.line.{kind}{{stroke:{colours[kind]}}}.head.{kind}{{fill:{colours[kind]}}}"
            f".box.{kind}{{fill:{colours[kind + '-fill']};stroke:{colours[kind]}}}"
        )
    return "".join(rules)


STYLE = (
    f"<style>text{{font-family:system-ui,sans-serif}}{_rules(LIGHT)}"
    f"@media(prefers-color-scheme:dark){{{_rules(DARK)}}}</style>"
)


class Sketch:
    """A drawing of a size; shapes are added in order, and `svg()` is the file."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "", size: float = 14) -> None:
        """A rounded box with centred lines of text."""
        self.parts.append(f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"/>')
        lines = text.split("\n") if text else []
        for number, line in enumerate(lines):
            at = y + h / 2 + (number - (len(lines) - 1) / 2) * size * 1.25 + size * 0.35
            self.text(x + w / 2, at, line, kind, size)

    def text(self, x: float, y: float, text: str, kind: str = "", size: float = 14, anchor: str = "middle") -> None:
        """A line of text whose base line is at y."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}">'
            f"{html.escape(text)}</text>"
        )

    def line(self, points: list[tuple[float, float]], kind: str = "", dashed: bool = False, width: float = 1.6) -> None:
        """A line through points."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path class="line {kind}" d="{path}" stroke-width="{width:g}"{dash}/>')

    def arrow(self, points: list[tuple[float, float]], kind: str = "", dashed: bool = False) -> None:
        """A line with a head at its last point."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        back = (x1 - 8 * math.cos(angle), y1 - 8 * math.sin(angle))
        self.line([*points[:-1], back], kind, dashed)
        wings = [
            (x1 - 10 * math.cos(angle + s) , y1 - 10 * math.sin(angle + s)) for s in (0.42, -0.42)
        ]  # fmt: skip
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x1, y1), *wings))
        self.parts.append(f'<polygon class="head {kind}" points="{corners}"/>')

    def grid(self, x: float, y: float, rows: int, columns: int, cell: float, kind: str = "") -> None:
        """A matrix as cells."""
        for r in range(rows):
            for c in range(columns):
                self.parts.append(
                    f'<rect class="box {kind}" x="{x + c * cell:g}" y="{y + r * cell:g}" width="{cell:g}" '
                    f'height="{cell:g}" stroke-width="0.8"/>'
                )

    def svg(self) -> str:
        """The file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}">'
        return "\n".join([head, STYLE, *self.parts, "</svg>"]) + "\n"
