"""Quantities: functions of what came in and what came back at each use of a parameter."""

from layerwise.quantities.base import ByParameter, Quantity
from layerwise.quantities.diag_ggn import DiagGGN
from layerwise.quantities.first_order import PerSampleGrad, SecondMoment, SquaredNorm, Variance
from layerwise.quantities.kronecker import KFAC

__all__ = [
    "KFAC",
    "ByParameter",
    "DiagGGN",
    "PerSampleGrad",
    "Quantity",
    "SecondMoment",
    "SquaredNorm",
    "Variance",
]
