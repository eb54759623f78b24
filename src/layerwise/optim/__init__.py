"""Optimizers: thin `torch.optim.Optimizer` classes over pure updates. Each takes `step(closure)`."""

from layerwise.optim.altmin import AltMin
from layerwise.optim.locoprop import LocoProp

__all__ = ["AltMin", "LocoProp"]
