"""The quantities of the comparison, and on which nets each is measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUANTITIES", "Row"]

ALL = ("mlp", "3c3d", "all-cnn-c", "resnet8", "transformer")


@dataclass(frozen=True)
class Row:
    """One quantity.

    key: how contenders know it. deterministic: whether values must agree between libraries. exact: whether it needs a
    column for each class, and with it the smaller batch. kind: how it is grouped in the goals.
    """

    key: str
    nets: tuple[str, ...] = ALL
    deterministic: bool = True
    exact: bool = False
    reduced: bool = True


QUANTITIES = {
    row.key: row
    for row in (
        Row("empty observe", reduced=False),
        Row("per-sample gradient", reduced=False),
        Row("norms"),
        Row("second moment"),
        Row("variance"),
        Row("four first-order", reduced=False),
        Row("six reduced first-order"),
        Row("GGN diagonal, 1 sample", deterministic=False),
        Row("GGN diagonal, exact", exact=True),
        Row("K-FAC, 1 sample", deterministic=False),
        Row("KFLR", exact=True),
        Row("KFRA", ("mlp",)),
        Row("Hessian diagonal", ("mlp", "mlp-sigmoid", "3c3d"), exact=True),
        Row("GGN times a vector", reduced=False),
        Row("pairwise dots"),
    )
}
