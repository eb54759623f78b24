"""The method am-async."""

from benchmarks.training.plugin import TrainingSolver


class Solver(TrainingSolver):
    """See `am-async` in benchmarks/training/methods.py."""

    name = "am-async"
