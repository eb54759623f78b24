"""The method sgd-100."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `sgd-100` in benchmarks/training/methods.py."""

    name = "sgd-100"
