"""All problems by name, of both studies."""

from __future__ import annotations

from .altmin.problems import PROBLEMS as _ALTMIN
from .locoprop.problems import PROBLEMS as _LOCOPROP
from .problem import Problem

__all__ = ["PROBLEMS"]

PROBLEMS: dict[str, Problem] = _LOCOPROP | _ALTMIN
