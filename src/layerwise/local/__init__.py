"""Local problems of layers: transfer functions, targets, losses and solvers."""

from __future__ import annotations
