"""The kinds of curvature that gradients can be preconditioned with, each one row of a table.

A kind says what to measure, what form of inverse its blocks have, and what takes its place for the parameters that it
does not suit. Averages, inverses, products, refusals and state are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layerwise.errors import BadInput
from layerwise.optim.second_order import measured
from layerwise.optim.second_order.measured import Request
from layerwise.quantities.base import Quantity

__all__ = ["KINDS", "Curvature", "curvature"]


@dataclass(frozen=True)
class Curvature:
    """A kind of curvature.

    measure: the quantity that gives its blocks. form: of their inverses (`invert`); None: as the user chose.
    sampled: whether labels (or signs) are drawn; a kind that is not has no number of samples. common: whether what is
    drawn belongs to the parameters, so that all ranks draw the same; labels belong to the samples.
    instant: whether inverses cost so little that they follow every new average, not `update_inverses_every`.
    whole: whether a batch whose samples cannot be told apart may be measured as one. reduces: whether the positions
    of a sample may meet before they are squared. rest: the kind for parameters without factors; None: no curvature.
    """

    measure: Callable[[Request], Quantity]
    form: str | None = None
    sampled: bool = False
    common: bool = False
    instant: bool = False
    whole: bool = False
    reduces: bool = False
    rest: str | None = None


KINDS = {
    "kfac": Curvature(measured.kfac, sampled=True, reduces=True, rest="diag-ggn-mc"),
    "kflr": Curvature(measured.kflr, reduces=True, rest="diag-ggn-mc"),
    "kfra": Curvature(measured.kfra, reduces=True, rest="diag-ggn-mc"),
    "ekfac": Curvature(measured.ekfac, sampled=True, instant=True, whole=True, rest="diag-ggn-mc"),
    "foof": Curvature(measured.foof, form="input", reduces=True),
    "diag-ggn": Curvature(measured.ggn_diagonal, instant=True),
    "diag-ggn-mc": Curvature(measured.ggn_diagonal, sampled=True, instant=True, whole=True),
    "diag-hessian": Curvature(measured.hessian_diagonal, instant=True),
    "diag-hessian-mc": Curvature(measured.hessian_diagonal, sampled=True, common=True, instant=True),
}


def curvature(kind: str) -> Curvature:
    """The kind of that name. Raises BadInput for one that there is not."""
    if kind not in KINDS:
        raise BadInput(f"the kinds of curvature are {', '.join(KINDS)}; got kind={kind!r}")
    return KINDS[kind]
