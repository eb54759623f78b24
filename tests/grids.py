"""Grids of cases of which `make test` runs a part and `make test-all` runs all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

__all__ = ["one_in"]


def one_in(part: int, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by all combinations of the axes; one in `part` runs always, the others are slow tests.

    Those that run lie on diagonals: of two axes with at least `part` values each value runs, of three each pair.
    """
    grid = []
    for cell in product(*map(enumerate, axes.values())):
        always = sum(place for place, _ in cell) % part == 0
        grid.append(pytest.param(*(value for _, value in cell), marks=() if always else pytest.mark.slow))
    return pytest.mark.parametrize(tuple(axes), grid, ids=_name)


def _name(value: Any) -> str | None:
    """A case's own name, a plain collection as it is written, and pytest's name for what is left."""
    return getattr(value, "id", str(value) if isinstance(value, dict | list | tuple) else None)
