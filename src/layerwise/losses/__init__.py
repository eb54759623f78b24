"""Loss calls of torch and their likelihoods: gradient, exact and sampled roots of the loss Hessian."""

from __future__ import annotations

from .base import Likelihood, Unread
from .call import LossCall, bind, check, is_loss, sides_of
from .likelihood import likelihood, scale_to_union
from .mark import OwnCall, OwnLoss, as_loss, tensors_in
from .own import DeclaredLikelihood, OwnLikelihood
from .projected import PROJECTED

__all__ = [
    "PROJECTED",
    "DeclaredLikelihood",
    "Likelihood",
    "LossCall",
    "OwnCall",
    "OwnLikelihood",
    "OwnLoss",
    "Unread",
    "as_loss",
    "bind",
    "check",
    "is_loss",
    "likelihood",
    "scale_to_union",
    "sides_of",
    "tensors_in",
]
