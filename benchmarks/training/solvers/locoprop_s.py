"""The method locoprop-s."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `locoprop-s` in benchmarks/training/methods.py."""

    name = "locoprop-s"
