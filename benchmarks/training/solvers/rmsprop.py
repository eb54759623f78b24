"""The method rmsprop."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `rmsprop` in benchmarks/training/methods.py."""

    name = "rmsprop"
