"""The method adagrad-100."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `adagrad-100` in benchmarks/training/methods.py."""

    name = "adagrad-100"
