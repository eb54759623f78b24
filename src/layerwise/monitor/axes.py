"""Chart axes: range, tick positions and number formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Axis", "axis_for", "linear_ticks", "log_ticks", "number"]

_DECADES = 10  # the largest range of a log axis: smaller values are outliers
_SPREAD = 20  # an axis is logarithmic if largest / smallest value is at least this


class Axis(NamedTuple):
    """A map from values in [low, high] to positions in [start, end]."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def at(self, value: float) -> float:
        """The position of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(value) if self.log else value
        part = (value / 2 - low / 2) / (high / 2 - low / 2)  # halved, so that the difference cannot overflow
        return self.start + (self.end - self.start) * part

    def shows(self, value: float) -> bool:
        """Whether the value lies on the axis."""
        return math.isfinite(value) and self.low <= value <= self.high

    def ticks(self) -> list[float]:
        """The tick values, round numbers on the axis."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def axis_for(values: Sequence[float], start: float, end: float, linear: bool = False) -> Axis:
    """An axis for finite values: logarithmic if all are positive and spread widely, unless `linear`."""
    if not values:
        return Axis(0.0, 1.0, False, start, end)
    low, high = min(values), max(values)
    positive = [value for value in values if value > 0]
    mostly = positive and len(positive) >= 0.9 * len(values) and low >= 0
    if not linear and mostly and high / min(positive) >= _SPREAD:
        low = max(min(positive), high * 10.0**-_DECADES)
        room = (high / low) ** 0.04
        return Axis(low / room, high * room, True, start, end)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    if not math.isfinite(room):  # values near the largest float
        return Axis(low, high, False, start, end)
    return Axis(0.0 if low == 0 else low - room, high + room, False, start, end)


def linear_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most `most` of them."""
    if not (high > low and math.isfinite(high - low)):
        return [low]
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * unit for s in (1, 2, 5, 10, 20, 50) if (high - low) / (s * unit) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, first + most + 1) if n * step <= high + 1e-9 * step]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten; also 2 and 5 times these where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if math.log10(high) - math.log10(low) <= 2 else (1,)
    ticks = [d * 10.0**power for power in range(first, last + 1) for d in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else [low]


def number(value: float, digits: int = 3) -> str:
    """A number as short text: 0.012, 1,250, 3.2e-7, ∞, NaN."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(power)}".replace("-", "−")
    places = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    text = f"{value:,.{places}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
