"""The method locoprop-m-all-rows."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `locoprop-m-all-rows` in benchmarks/training/methods.py."""

    name = "locoprop-m-all-rows"
