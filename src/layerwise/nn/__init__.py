"""Activations without a derivative: signs and others that codes cross by a rule of their own."""

from __future__ import annotations

from layerwise.nn.hard import Hard, Sign, crossing, hard
from layerwise.nn.rules import Hinge, Smooth, StraightThrough

__all__ = ["Hard", "Hinge", "Sign", "Smooth", "StraightThrough", "crossing", "hard"]
