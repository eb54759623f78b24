"""What a contender is: a library, and programs that compute the gradient and a quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Contender", "Program", "Unsupported", "reduced"]


class Unsupported(Exception):
    """The library does not have this quantity for this net; the text says why."""


class Program(NamedTuple):
    """run: one step, gradient and quantity; what it returns holds the results and frees them when it goes.

    values: the results by parameter name in the scale `loss`, to be compared; called outside the clock. Factors known
    up to scale come as `name.A` and `name.B`. covers: the parameters that have a result, where those are not all.
    """

    run: Callable[[], Any]
    values: Callable[[Any], dict[str, Tensor]] | None = None
    covers: Callable[[Any], list[str]] | None = None


class Contender(NamedTuple):
    """A library: the module it is imported as (None: torch itself), its distribution, and its programs."""

    label: str
    module: str | None
    distribution: str
    program: Callable[[str, Any], Program]


def reduced(quantity: str, rows: Mapping[str, Tensor], n: int) -> dict[str, Any]:
    """A first-order quantity of per-sample gradients `[N, *shape]` of the sample's own losses, as a user would."""

    def norm(g: Tensor) -> Tensor:
        return g.flatten(1).square().sum(1)

    def moment(g: Tensor) -> Tensor:
        return g.square().sum(0)

    def dots(g: Tensor) -> Tensor:
        return g.flatten(1) @ g.flatten(1).T

    def variance(g: Tensor) -> Tensor:
        return g.var(0, correction=0)

    wanted: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "per-sample gradient": [],
        "norms": [norm],
        "second moment": [moment],
        "variance": [variance],
        "pairwise dots": [dots],
        "four first-order": [norm, moment, variance],
        "six reduced first-order": [norm, moment, variance, dots],
    }
    if quantity not in wanted:
        raise Unsupported("no such quantity")
    functions = wanted[quantity]
    if quantity == "per-sample gradient":
        return dict(rows)
    found = {name: tuple(f(g) for f in functions) for name, g in rows.items()}
    return {k: v[0] if len(v) == 1 else v for k, v in found.items()}
