"""Layerwise: more than the gradient, and learning layer by layer, from one run of a PyTorch model."""

from layerwise import errors, optim
from layerwise.observe import observe
from layerwise.operators.kronecker import Kronecker
from layerwise.optim.altmin import AltMin
from layerwise.optim.locoprop import LocoProp
from layerwise.quantities import (
    KFAC,
    ByParameter,
    DiagGGN,
    PerSampleGrad,
    Quantity,
    SecondMoment,
    SquaredNorm,
    Variance,
)

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "AltMin",
    "ByParameter",
    "DiagGGN",
    "Kronecker",
    "LocoProp",
    "PerSampleGrad",
    "Quantity",
    "SecondMoment",
    "SquaredNorm",
    "Variance",
    "errors",
    "observe",
    "optim",
]
