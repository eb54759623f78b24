"""What bounds ours where a peer is ahead, or where the goal of half of BackPACK's extra time is missed."""

from __future__ import annotations

__all__ = ["BOUNDS"]

BOUNDS: dict[tuple[str, str], str] = {}
