"""Activations without a derivative, such as signs, and their surrogate gradients."""

from __future__ import annotations

from layerwise.nn.hard import Hard, Sign, crossing, hard
from layerwise.nn.rules import Hinge, Smooth, StraightThrough

__all__ = ["Hard", "Hinge", "Sign", "Smooth", "StraightThrough", "crossing", "hard"]
