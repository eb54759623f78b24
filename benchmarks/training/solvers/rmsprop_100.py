"""The method rmsprop-100."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `rmsprop-100` in benchmarks/training/methods.py."""

    name = "rmsprop-100"
