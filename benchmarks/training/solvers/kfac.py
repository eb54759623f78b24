"""The method kfac."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `kfac` in benchmarks/training/methods.py."""

    name = "kfac"
