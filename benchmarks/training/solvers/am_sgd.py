"""The method am-sgd."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `am-sgd` in benchmarks/training/methods.py."""

    name = "am-sgd"
