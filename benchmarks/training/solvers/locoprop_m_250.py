"""The method locoprop-m-250."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `locoprop-m-250` in benchmarks/training/methods.py."""

    name = "locoprop-m-250"
