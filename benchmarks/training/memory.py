"""The memory that a stretch of a program takes at most, read from the kernel."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Peak"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Resident memory above that at the time of construction: `mb()` is its peak since, NaN without Linux's /proc."""

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5")  # the peak is from now on
            self._start = _kilobytes("VmRSS")
        except OSError:
            self._start = float("nan")

    def mb(self) -> float:
        """Megabytes (10⁶ bytes)."""
        return (_kilobytes("VmHWM") - self._start) * 1024 / 1e6 if self._start == self._start else float("nan")


def _kilobytes(name: str) -> float:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith(name + ":")).split()[1])
