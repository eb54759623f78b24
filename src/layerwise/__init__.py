"""Layerwise: more than the gradient, and learning layer by layer, from one run of a PyTorch model."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from layerwise import errors, local, nn, optim
from layerwise.losses import as_loss
from layerwise.observation.accumulate import accumulate
from layerwise.observation.observe import observe
from layerwise.operators.curvature import GGN, PCH, Hessian
from layerwise.operators.kronecker import EigenKronecker, Kronecker
from layerwise.optim.layer_local.altmin import AltMin
from layerwise.optim.layer_local.locoprop import LocoProp
from layerwise.quantities import (
    EKFAC,
    KFAC,
    KFLR,
    KFRA,
    ByParameter,
    ClippedGrad,
    DiagGGN,
    DiagHessian,
    FisherDiag,
    NoiseScale,
    PairwiseDot,
    PerSampleGrad,
    Quantity,
    SecondMoment,
    Sketch,
    SqrtGGN,
    SquaredNorm,
    Variance,
)

if TYPE_CHECKING:
    from layerwise import attribution, distributed, monitor

__version__ = "0.2.0"

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCH",
    "AltMin",
    "ByParameter",
    "ClippedGrad",
    "DiagGGN",
    "DiagHessian",
    "EigenKronecker",
    "FisherDiag",
    "Hessian",
    "Kronecker",
    "LocoProp",
    "NoiseScale",
    "PairwiseDot",
    "PerSampleGrad",
    "Quantity",
    "SecondMoment",
    "Sketch",
    "SqrtGGN",
    "SquaredNorm",
    "Variance",
    "accumulate",
    "as_loss",
    "attribution",
    "distributed",
    "errors",
    "local",
    "monitor",
    "nn",
    "observe",
    "optim",
]


def __getattr__(name: str) -> ModuleType:
    """The packages that only some programs use, imported at their first use (PEP 562)."""
    if name in {"attribution", "distributed", "monitor"}:
        return import_module(f"layerwise.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
