"""A report of a run as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from layerwise.errors import BadInput
from layerwise.monitor.axes import number
from layerwise.monitor.chart import chart
from layerwise.monitor.series import LEFT_OUT, Curve, by_measure

__all__ = ["page"]


class _Title(NamedTuple):
    """The heading of a chart; linear: its axis is never logarithmic."""

    title: str
    unit: str
    linear: bool = False


TITLES = {
    "loss": _Title("Loss", "of the batch, in the loss's own unit"),
    "noise_scale": _Title("Gradient noise scale", "tr Σ / |G|², samples"),
    "signal_to_noise": _Title(
        "Signal to noise", "median of squared mean / variance of the gradient's elements, no unit"
    ),
    "curvature": _Title("Curvature", "trace of the Gauss-Newton matrix, loss / parameter unit²"),
    "largest_eigenvalue": _Title("Largest eigenvalue", "of the sampled Gauss-Newton matrix, loss / parameter unit²"),
    "update_size": _Title("Update size", "‖Δθ‖ / ‖θ‖, no unit"),
    "update_cosine": _Title("Local move against global gradient", "cosine of Δθ with −∂L/∂θ, no unit", True),
    "alignment": _Title("Alignment within the batch", "mean cosine of two samples' gradients, no unit", True),
    "gradient_norm": _Title("Gradient norm", "‖∂L/∂θ‖, loss / parameter unit"),
}
_ROWS = 200  # the most rows of the table by step


def page(records: Sequence[Mapping[str, Any]], title: str = "Training run") -> str:
    """The HTML of a run's records: a chart for each measure, a line for each parameter, and tables of the numbers.

    Values that no axis can show get marks: NaN a cross at the bottom, infinity a triangle at the top, zero on a
    logarithmic axis a triangle at the bottom. Long curves are thinned to their extremes.
    Raises BadInput for no records.
    """
    if not records:
        raise BadInput("asked for a page of a run without a record; a monitor logs its first one at step 0")
    measures = by_measure(records)
    order = [name for name in TITLES if name in measures] + [name for name in measures if name not in TITLES]
    parameters = list(dict.fromkeys(name for name in _parameters(measures) if name))
    first, last = records[0]["step"], records[-1]["step"]
    span = f"steps {number(first, 9)} to {number(last, 9)}" if len(records) > 1 else f"step {number(first, 9)}"
    said = f"{_count(len(records), 'record')}, {span}, {_count(len(parameters), 'parameter')}"
    body = [
        f"<header><h1>{escape(title)}</h1><p>{said}</p></header>",
        _tiles(measures, order),
        _left_out(records),
        _legend(parameters),
        '<main class="charts">',
        *(_card(name, measures[name], parameters) for name in order),
        "</main>",
        f'<section class="tables"><h2>Tables</h2>{_latest(measures, order, parameters)}{_steps(records, measures)}'
        "</section>",
        '<div class="tip" role="status" hidden></div>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head>\n<body>"
        + "\n".join(part for part in body if part)
        + f"\n<script>{_asset('page.js')}</script></body></html>\n"
    )


def _count(many: int, what: str) -> str:
    return f"{many:,} {what}{'' if many == 1 else 's'}"


def _asset(name: str) -> str:
    return files("layerwise.monitor").joinpath(name).read_text(encoding="utf-8")


def _parameters(measures: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """The names of all parameters, in model order: that of the measure with the most parameters."""
    by_size = sorted(measures.values(), key=len, reverse=True)
    return [name for curves in by_size for name in curves]


def _about(measure: str) -> _Title:
    return TITLES.get(measure, _Title(measure.replace("_", " ").capitalize(), ""))


def _tiles(measures: Mapping[str, Mapping[str, Curve]], order: Sequence[str]) -> str:
    """Tiles with the last number of the whole model for each measure."""
    tiles = [
        f"<div><dt>{escape(_about(name).title)}</dt><dd>{number(measures[name][''].values[-1])}</dd></div>"
        for name in order
        if "" in measures[name]
    ]
    return f'<dl class="tiles" aria-label="Whole model, last record">{"".join(tiles)}</dl>' if tiles else ""


def _left_out(records: Sequence[Mapping[str, Any]]) -> str:
    """A list of the measures that were left out, and why."""
    reasons = {k: (r["step"], str(v)) for r in records for k, v in r.items() if k.startswith(LEFT_OUT)}
    items = "".join(
        f"<li><b>{escape(_about(name.removeprefix(LEFT_OUT)).title)}</b>, step {step}: {escape(why)}</li>"
        for name, (step, why) in reasons.items()
    )
    return f'<section class="left-out"><h2>Left out</h2><ul>{items}</ul></section>' if items else ""


def _legend(parameters: Sequence[str]) -> str:
    if not parameters:
        return ""
    last = max(1, len(parameters) - 1)
    chips = "".join(
        f'<button type="button" class="chip{" bias" if name.rpartition(".")[2].startswith("bias") else ""}" '
        f'data-name="{escape(name)}" aria-pressed="false" style="--d:{place / last:.3f}"><i></i>{escape(name)}</button>'
        for place, name in enumerate(parameters)
    )
    return (
        '<section class="legend" aria-label="Parameters"><label>Show <input type="search" '
        'placeholder="part of a name" aria-label="Show parameters whose name contains"></label>'
        f'<div class="chips"><span class="chip whole"><i></i>whole model</span>{chips}</div></section>'
    )


def _card(measure: str, curves: Mapping[str, Curve], parameters: Sequence[str]) -> str:
    about = _about(measure)
    values = [value for curve in curves.values() for value in curve.values]
    odd = {
        "not a number (×)": sum(math.isnan(v) for v in values),
        "infinite (▲)": sum(v == math.inf for v in values),
    }
    notes = [f"{count:,} {what}" for what, count in odd.items() if count]
    drawn = chart(curves, parameters, f"{about.title}, {about.unit or measure}, by step", about.linear)
    notes += ["some below the axis (▼): minus infinity, or zero on a logarithmic one"] if "mark below" in drawn else []
    note = f'<p class="note">Of {_count(len(values), "value")}: {", ".join(notes)}</p>' if notes else ""
    unit = f"<span>{escape(about.unit)}</span>" if about.unit else ""
    head = f"<figcaption>{escape(about.title)}{unit}</figcaption>"
    return f'<figure data-measure="{escape(measure)}">{head}{drawn}{note}</figure>'


def _latest(measures: Mapping[str, Mapping[str, Curve]], order: Sequence[str], parameters: Sequence[str]) -> str:
    """A table of the last numbers of every parameter."""
    shown = [name for name in order if any(measures[name])]
    if not shown:
        return ""
    rows = [
        [name, *(number(measures[m][name].values[-1]) if name in measures[m] else "" for m in shown)]
        for name in parameters
    ]
    return _table("Last numbers by parameter", ["parameter", *(_about(m).title for m in shown)], rows)


def _steps(records: Sequence[Mapping[str, Any]], measures: Mapping[str, Mapping[str, Curve]]) -> str:
    """A table of the whole model's numbers by step."""
    names = [name for name, curves in measures.items() if "" in curves]
    every = math.ceil(len(records) / _ROWS)
    shown = [record for i, record in enumerate(records) if i % every == 0 or i == len(records) - 1]
    rows = [[f"{r['step']}", *(number(float(r[n])) if n in r else "" for n in names)] for r in shown]
    few = "" if every == 1 else f", {len(shown)} of {len(records)} records"
    return _table(f"Whole model by step{few}", ["step", *(_about(n).title for n in names)], rows) if names else ""


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<details><summary>{escape(caption)}</summary><div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></details>"
    )
