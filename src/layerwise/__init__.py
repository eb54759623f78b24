"""Layerwise: more than the gradient, and learning layer by layer, from one run of a PyTorch model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from layerwise import errors, nn
from layerwise.losses import as_loss
from layerwise.observation.accumulate import accumulate
from layerwise.observation.observe import observe
from layerwise.operators.curvature import GGN, PCH, Hessian
from layerwise.operators.kronecker import EigenKronecker, Kronecker
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
    from layerwise import attribution, distributed, local, monitor, optim
    from layerwise.optim.layer_local.altmin import AltMin
    from layerwise.optim.layer_local.locoprop import LocoProp

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


# Name -> where it is; the packages that only some programs use are imported at the first use of the name (PEP 562).
_AT_FIRST_USE = {
    "AltMin": "layerwise.optim",
    "LocoProp": "layerwise.optim",
    "attribution": "layerwise",
    "distributed": "layerwise",
    "local": "layerwise",
    "monitor": "layerwise",
    "optim": "layerwise",
}


def __getattr__(name: str) -> Any:
    """A package, or a class of the optimizers, that is imported at its first use."""
    where = _AT_FIRST_USE.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if where == __name__:
        return import_module(f"{where}.{name}")
    return getattr(import_module(where), name)


def __dir__() -> list[str]:
    """All public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
