"""The method locoprop-m."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `locoprop-m` in benchmarks/training/methods.py."""

    name = "locoprop-m"
