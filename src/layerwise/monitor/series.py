"""Curves from records: numbers by measure and parameter, thinned to the resolution of a chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["LEFT_OUT", "Curve", "by_measure", "thinned"]

LEFT_OUT = "left_out/"  # the prefix of keys whose values are reasons


class Curve(NamedTuple):
    """The values of one number at its steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def finite(self) -> list[float]:
        """The finite values."""
        return [value for value in self.values if math.isfinite(value)]


def by_measure(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """`{measure: {parameter: curve}}`, in the order of the records; the whole model's curve has the name ""."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and not key.startswith(LEFT_OUT):
                measure, _, parameter = key.partition("/")
                found.setdefault(measure, {}).setdefault(parameter, []).append((record["step"], float(value)))
    return {
        measure: {parameter: Curve(*zip(*points, strict=True)) for parameter, points in curves.items()}
        for measure, curves in found.items()
    }


def thinned(curve: Curve, most: int) -> Curve:
    """A curve of about `most` points that looks the same: the extremes of each interval, NaN and infinity."""
    count = len(curve.steps)
    if count <= most:
        return curve
    stretches = max(1, most // 3)
    kept = {0, count - 1}
    for number in range(stretches):
        here = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [i for i in here if math.isfinite(curve.values[i])]
        other = [i for i in here if not math.isfinite(curve.values[i])]
        if finite:
            kept |= {min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)}
        kept |= set(other[:1])
    order = sorted(kept)
    return Curve(tuple(curve.steps[i] for i in order), tuple(curve.values[i] for i in order))
