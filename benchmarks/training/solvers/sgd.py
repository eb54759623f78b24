"""The method sgd."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `sgd` in benchmarks/training/methods.py."""

    name = "sgd"
