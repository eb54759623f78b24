"""The method kflr."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `kflr` in benchmarks/training/methods.py."""

    name = "kflr"
