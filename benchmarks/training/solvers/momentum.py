"""The method momentum."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `momentum` in benchmarks/training/methods.py."""

    name = "momentum"
