"""All problems by name, of every study."""

from __future__ import annotations

from .altmin.problems import PROBLEMS as _ALTMIN
from .curvature.problems import PROBLEMS as _CURVATURE
from .locoprop.problems import PROBLEMS as _LOCOPROP
from .problem import Problem

__all__ = ["PROBLEMS"]

PROBLEMS: dict[str, Problem] = _LOCOPROP | _ALTMIN | _CURVATURE
