"""The method adagrad."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `adagrad` in benchmarks/training/methods.py."""

    name = "adagrad"
