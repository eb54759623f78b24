"""Results as matrices (Kronecker, diagonal, GGN, Hessian), and damped solvers."""

from __future__ import annotations

from layerwise.operators.diagonal import Diagonal
from layerwise.operators.kronecker import EigenBlock, EigenKronecker, Kronecker, KroneckerBlock
from layerwise.operators.ridge import coordinate_descent, inverse, ridge

__all__ = [
    "Diagonal",
    "EigenBlock",
    "EigenKronecker",
    "Kronecker",
    "KroneckerBlock",
    "coordinate_descent",
    "inverse",
    "ridge",
]
