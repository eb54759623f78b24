"""Every kind of curvature, and how an optimizer is asked for it."""

from __future__ import annotations

from typing import Any

from layerwise.optim.second_order.settings import DIAGONALS, FACTORS

__all__ = ["ASKED", "KINDS"]

ASKED: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in FACTORS},
    **{kind: {"kind": kind, "draws": None} for kind in DIAGONALS},
    **{f"{kind} drawn": {"kind": kind, "draws": 1} for kind in DIAGONALS},
}
KINDS = tuple(ASKED)
