"""All methods by name: LocoProp's study, AltMin's, and the baselines that both share."""

from __future__ import annotations

from dataclasses import replace

from .altmin.methods import METHODS as _ALTMIN
from .altmin.methods import SHARED
from .locoprop.methods import METHODS as _LOCOPROP
from .method import Method

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    name: replace(m, spaces={**m.spaces, **SHARED.get(name, {})}) for name, m in _LOCOPROP.items()
} | _ALTMIN
