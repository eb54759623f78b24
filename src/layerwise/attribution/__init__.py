"""Data attribution: which training samples made a model say what it says (influence functions, gradient indices)."""

from layerwise.attribution.index import GradientIndex
from layerwise.attribution.influence import Influence

__all__ = ["GradientIndex", "Influence"]
