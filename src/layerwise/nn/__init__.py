"""Other ways back than the derivative: surrogate gradients of functions without one, and targets through inverses."""

from __future__ import annotations

from layerwise.nn.hard import Hard, Sign, crossing, hard
from layerwise.nn.inverses import TargetPropagation
from layerwise.nn.rules import Hinge, Smooth, StraightThrough

__all__ = ["Hard", "Hinge", "Sign", "Smooth", "StraightThrough", "TargetPropagation", "crossing", "hard"]
