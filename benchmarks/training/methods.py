"""All methods by name: those of each study, and the baselines that they share."""

from __future__ import annotations

from dataclasses import replace

from .altmin.methods import METHODS as _ALTMIN
from .altmin.methods import SHARED as _IN_ALTMIN
from .curvature.methods import METHODS as _CURVATURE
from .curvature.methods import SHARED as _IN_CURVATURE
from .locoprop.methods import METHODS as _LOCOPROP
from .method import Method

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    name: replace(m, spaces={**m.spaces, **_IN_ALTMIN.get(name, {}), **_IN_CURVATURE.get(name, {})})
    for name, m in (_LOCOPROP | _ALTMIN | _CURVATURE).items()
}
