"""The quantities of the comparison, and on which nets each is measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUANTITIES", "Row"]

ALL = ("mlp", "3c3d", "all-cnn-c", "resnet8", "transformer")
LARGE = ("gpt", "t5-like", "resnet18")


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
        Row("empty observe", ALL + LARGE, reduced=False),
        Row("per-sample gradient", ALL + LARGE, reduced=False),
        Row("norms", ALL + LARGE),
        Row("second moment", ALL + LARGE),
        Row("variance"),
        Row("four first-order", reduced=False),
        Row("six reduced first-order"),
        Row("GGN diagonal, 1 sample", deterministic=False),
        Row("GGN diagonal, exact", exact=True),
        Row("K-FAC, 1 sample", deterministic=False),
        Row("KFLR", exact=True),
        Row("KFRA", ("mlp",)),
        Row("Hessian diagonal", ("mlp", "mlp-sigmoid", "3c3d"), exact=True),
        Row("GGN times a vector", ALL + LARGE, reduced=False),
        Row("pairwise dots"),
    )
}
