"""Benchopt's objective: see `benchmarks/training/plugin.py`."""

from benchmarks.training.plugin import TrainingObjective


class Objective(TrainingObjective):
    """Train loss and test loss by epoch."""

    name = "training"
