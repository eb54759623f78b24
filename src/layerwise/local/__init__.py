"""Local problems of layers: transfer functions, targets, regularizers and solvers, as values to choose from."""

from __future__ import annotations

from layerwise.local.codes.code_step import CodeStep
from layerwise.local.codes.coupling import Coupling
from layerwise.local.metric import Metric
from layerwise.local.norms import ColumnNorm, FrobeniusNorm, MaxNorm, NormBall, RowNorm, SpectralNorm
from layerwise.local.problem import LocalProblem, Pull, local_gradient, local_loss
from layerwise.local.regularizers import Elastic, Proximal, WeightDecay
from layerwise.local.solvers.memory import Memory, mairal
from layerwise.local.solvers.stopping import marginal_value
from layerwise.local.solvers.tf_rmsprop import TFRMSProp
from layerwise.local.solvers.values import (
    Anderson,
    ConditionalGradient,
    ConjugateGradient,
    LocalSteps,
    Newton,
    ProximalSolve,
    Spectral,
)
from layerwise.local.targets import GradientStep, Mirror, NaturalStep, Polyak
from layerwise.local.transfer import (
    ARCTAN,
    ELU,
    HARD_TANH,
    IDENTITY,
    RELU,
    RELU_SQUARED,
    SIGMOID,
    SOFTMAX,
    SOFTPLUS,
    TANH,
    Transfer,
    elu,
    hard_tanh,
    leaky_relu,
    softplus,
)
from layerwise.local.whitening import Whitening, whitened

__all__ = [
    "ARCTAN", "ELU", "HARD_TANH", "IDENTITY", "RELU", "RELU_SQUARED", "SIGMOID", "SOFTMAX", "SOFTPLUS", "TANH",
    "Anderson", "CodeStep", "ColumnNorm", "ConditionalGradient", "ConjugateGradient", "Coupling", "Elastic",
    "FrobeniusNorm", "GradientStep", "LocalProblem", "LocalSteps", "MaxNorm", "Memory", "Metric", "Mirror",
    "NaturalStep", "Newton", "NormBall", "Polyak", "Proximal", "ProximalSolve", "Pull", "RowNorm", "Spectral",
    "SpectralNorm", "TFRMSProp", "Transfer", "WeightDecay", "Whitening", "elu", "hard_tanh", "leaky_relu",
    "local_gradient", "local_loss", "mairal", "marginal_value", "softplus", "whitened",
]  # fmt: skip
