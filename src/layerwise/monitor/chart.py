"""One chart as SVG: a line for each parameter, a thicker one for the whole model, marks for NaN and infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from layerwise.monitor.axes import Axis, axis_for, number
from layerwise.monitor.series import Curve, thinned

__all__ = ["HEIGHT", "WIDTH", "chart"]

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 38
_POINTS = 8000  # the most points in all lines of a chart together
_MANY = 30  # charts with at least this many lines draw them thin
_MARKS = {"nan": "M-3-3L3 3M-3 3L3-3", "above": "M-4 3L0-4L4 3Z", "below": "M-4-3L0 4L4-3Z"}


def chart(
    curves: Mapping[str, Curve], parameters: Sequence[str], label: str, linear: bool = False, tick: str = "step"
) -> str:
    """The SVG element of curves by parameter name, "" for the whole model.

    parameters: all names of the page, in order: a line's position among them sets its colour. linear: no log axis.
    """
    most = max(60, _POINTS // max(1, len(curves)))
    thin = {name: thinned(curve, most) for name, curve in curves.items()}
    steps = sorted({step for curve in thin.values() for step in curve.steps})
    x = Axis(steps[0], max(steps[-1], steps[0] + 1), False, LEFT, WIDTH - RIGHT)
    y = axis_for([v for curve in thin.values() for v in curve.finite], HEIGHT - BOTTOM, TOP, linear)
    places = {name: place / max(1, len(parameters) - 1) for place, name in enumerate(parameters)}
    order = sorted(thin, key=lambda name: (name == "", places.get(name, 0.0)))  # the whole model's line is drawn last
    lines = "".join(_line(name, thin[name], x, y, places.get(name)) for name in order)
    data = {"steps": steps, "x": [x.low, x.high, x.start, x.end], "y": [y.low, y.high, y.start, y.end], "log": y.log}
    many = " many" if len(thin) > _MANY else ""
    return (
        f'<svg class="chart{many}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-axes="{escape(json.dumps(data))}">{_grid(x, y, tick)}{lines}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def _grid(x: Axis, y: Axis, tick: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y.ticks():
        at = _px(y.at(value))
        kind = "grid zero" if abs(value) < 1e-9 * (y.high - y.low) else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{number(value)}</text>')
    whole = [value for value in x.ticks() if value == int(value)]
    for value in whole:
        at = _px(x.at(value))
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 17}" text-anchor="middle">{number(value, 7)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="tick" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(tick)}</text>')
    if y.log:
        parts.append(f'<text class="tick" x="{LEFT}" y="{HEIGHT - 4}">log scale</text>')
    return "".join(parts)


def _line(name: str, curve: Curve, x: Axis, y: Axis, place: float | None) -> str:
    """An SVG group of one line, interrupted where values cannot be shown, with marks at these steps."""
    pieces: list[str] = []
    marks: list[str] = []
    pen_down = False
    for step, value in zip(curve.steps, curve.values, strict=True):
        if y.shows(value):
            pieces.append(f"{'L' if pen_down else 'M'}{_px(x.at(step))} {_px(y.at(value))}")
            pen_down = True
            continue
        pen_down = False
        kind = "nan" if math.isnan(value) else "above" if value > y.high else "below"
        at = TOP - 5 if kind == "above" else HEIGHT - BOTTOM - 5
        marks.append(f'<path class="mark {kind}" transform="translate({_px(x.at(step))} {at})" d="{_MARKS[kind]}"/>')
    joined = list(zip(pieces, [*pieces[1:], "M"], strict=False))
    line = "".join(p for p, after in joined if p[0] == "L" or after[0] == "L")
    dots = "".join(f"{p}h0" for p, after in joined if p[0] == after[0] == "M")  # isolated points: round line caps
    kind = "whole" if not name else "bias" if name.rpartition(".")[2].startswith("bias") else "weight"
    style = "" if place is None else f' style="--d:{place:.3f}"'
    drawn = [f'<path class="{what}" d="{d}"/>' for what, d in (("line", line), ("dot", dots)) if d]
    return f'<g class="curve {kind}" data-name="{escape(name)}"{style}>{"".join([*drawn, *marks])}</g>'


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
