"""The method admm."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `admm` in benchmarks/training/methods.py."""

    name = "admm"
