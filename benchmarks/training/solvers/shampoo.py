"""The method shampoo."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `shampoo` in benchmarks/training/methods.py."""

    name = "shampoo"
