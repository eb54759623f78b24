"""Layerwise: more than the gradient, and learning layer by layer, from one run of a PyTorch model."""

from layerwise import distributed, errors, local, monitor, nn, optim
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
    "distributed",
    "errors",
    "local",
    "monitor",
    "nn",
    "observe",
    "optim",
]
