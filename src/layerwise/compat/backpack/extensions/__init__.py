"""BackPACK's extensions: each pairs a layerwise quantity with the parameter attribute for its result."""

from layerwise.compat.backpack.extensions.backprop_extension import BackpropExtension
from layerwise.compat.backpack.extensions.curvmatprod import GGNMP, HMP, PCHMP
from layerwise.compat.backpack.extensions.firstorder import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from layerwise.compat.backpack.extensions.secondorder import (
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
)

__all__ = [
    "GGNMP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "BackpropExtension",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]
