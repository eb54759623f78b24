"""Quantities: functions of the inputs and the output cotangents at each use of a parameter."""

from layerwise.graph.cotangents import Exact, Gradient, Sampled, Second
from layerwise.quantities.base import ByParameter, Quantity
from layerwise.quantities.clipped import ClippedGrad
from layerwise.quantities.diag_ggn import DiagGGN
from layerwise.quantities.dots import PairwiseDot
from layerwise.quantities.first_order import PerSampleGrad, SecondMoment, SquaredNorm, Variance
from layerwise.quantities.fisher import FisherDiag
from layerwise.quantities.hessian.diag_hessian import DiagHessian
from layerwise.quantities.kfra.kfra import KFRA
from layerwise.quantities.kronecker.ekfac import EKFAC
from layerwise.quantities.kronecker.factors import KFAC, KFLR
from layerwise.quantities.noise import NoiseScale
from layerwise.quantities.sketch import Sketch
from layerwise.quantities.sqrt_ggn import SqrtGGN

__all__ = [
    "EKFAC",
    "KFAC",
    "KFLR",
    "KFRA",
    "ByParameter",
    "ClippedGrad",
    "DiagGGN",
    "DiagHessian",
    "Exact",
    "FisherDiag",
    "Gradient",
    "NoiseScale",
    "PairwiseDot",
    "PerSampleGrad",
    "Quantity",
    "Sampled",
    "Second",
    "SecondMoment",
    "Sketch",
    "SqrtGGN",
    "SquaredNorm",
    "Variance",
]
