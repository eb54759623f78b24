"""Everything a layer sees: what came in, what went out, what came back, and what follows from them."""

from __future__ import annotations

__version__ = "0.1.0"
